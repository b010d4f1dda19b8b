"""VBench's dimensions for given images: the files that each needs, and VBench's normalization and
weight.

VBench 0.1.5 and DreamSim 0.2.1 look for weights at these places before they try to download them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

DREAMSIM_FOLDER = "dreamsim_model"
"""In the cache; DreamSim looks for `models` in the working folder, which is this folder while it
runs.
"""


@dataclass(frozen=True)
class Weight:
    """One file or folder that VBench reads.

    Attributes:
        path: under the cache, or under torch's hub folder if `in_hub`.
        source: its origin.
    """

    path: str
    source: str
    in_hub: bool = False

    def place(self, cache: Path) -> Path:
        """Return its place."""
        return (Path(torch.hub.get_dir()) if self.in_hub else cache) / self.path


@dataclass(frozen=True)
class Dimension:
    """One score of VBench.

    Attributes:
        weights: the weights that it reads.
        lowest, highest: raw scores that VBench's leaderboard normalises to 0 and 1
            (scripts/constant.py).
        share: its weight in VBench's own means.
        needs_cuda: whether it needs a GPU, on any device setting.
        of_image: whether it compares a video with its given first image.
    """

    weights: tuple[Weight, ...]
    lowest: float = 0.0
    highest: float = 1.0
    share: float = 1.0
    needs_cuda: bool = False
    of_image: bool = False

    def normalised(self, raw: float) -> float:
        """Normalize to 0 … 1 between VBench's bounds; values beyond them are not clipped, as in
        VBench.
        """
        return (raw - self.lowest) / (self.highest - self.lowest)


_DINO_FILE = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
_DINO_CODE = "git clone https://github.com/facebookresearch/dino"
_CLIP = "https://openaipublic.azureedge.net/clip/models"
_VICLIP = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main/ViClip-InternVid-10M-FLT.pth"
_DREAMSIM = (
    "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/dreamsim_ensemble_checkpoint.zip"
)

_DINO = (
    Weight("dino_model/dino_vitbase16_pretrain.pth", _DINO_FILE),
    Weight("dino_model/facebookresearch_dino_main", _DINO_CODE),
    # DINO's hubconf.py asks torch's hub for the same file again, wherever its code was loaded from.
    Weight("checkpoints/dino_vitbase16_pretrain.pth", _DINO_FILE, in_hub=True),
)

DIMENSIONS: Mapping[str, Dimension] = {
    "subject_consistency": Dimension(_DINO, 0.1462),
    "background_consistency": Dimension(
        (
            Weight(
                "clip_model/ViT-B-32.pt",
                f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
            ),
        ),
        0.2615,
    ),
    "motion_smoothness": Dimension(
        (Weight("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth"),),
        0.706,
        0.9975,
    ),
    "dynamic_degree": Dimension(
        (
            Weight(
                "raft_model/models/raft-things.pth", "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip"
            ),
        ),
        share=0.5,
    ),
    "aesthetic_quality": Dimension(
        (
            Weight(
                "clip_model/ViT-L-14.pt",
                f"{_CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
            ),
            Weight(
                "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
                "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
            ),
        )
    ),
    "imaging_quality": Dimension(
        (
            Weight(
                "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
                "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
            ),
        ),
    ),
    "overall_consistency": Dimension(
        (
            Weight("ViCLIP/ViClip-InternVid-10M-FLT.pth", _VICLIP),
            Weight(
                "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
                "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
            ),
        ),
        highest=0.364,
    ),
    "temporal_flickering": Dimension((), 0.6293),
    "i2v_subject": Dimension(_DINO, 0.1462, of_image=True),
    "i2v_background": Dimension(
        (
            *(
                Weight(f"{DREAMSIM_FOLDER}/models/{name}", _DREAMSIM)
                for name in (
                    "dino_vitb16_pretrain.pth",
                    "open_clip_vitb16_pretrain.pth.tar",
                    "clip_vitb16_pretrain.pth.tar",
                    "ensemble_lora",
                )
            ),
            Weight(f"{DREAMSIM_FOLDER}/models/facebookresearch_dino_main", _DINO_CODE),
            Weight(f"{DREAMSIM_FOLDER}/models/checkpoints/dino_vitbase16_pretrain.pth", _DINO_FILE),
        ),
        0.2615,
        needs_cuda=True,
        of_image=True,
    ),
}
"""The dimensions by VBench's name."""

DEFAULT = tuple(name for name in DIMENSIONS if name != "temporal_flickering")
"""VBench-I2V's own list without camera motion, whose code VBench's package lacks, and with overall
consistency, which papers report beside it. VBench-I2V leaves out temporal flickering, which is
meant for still scenes; it is measured here anyway, on lossless frames.
"""
