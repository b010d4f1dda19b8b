"""Assembly of the pipeline folder from the results of the training runs in runs/.

    # trained parts into src/tempoquant/tiny/weights
    python -m training.export
    # random weights of the same architecture, for tests of loading
    python -m training.export --untrained runs/x

The folder is written beside its place and then moved there, so a reader sees the old pipeline or
the new one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from tempoquant.tiny import weights_folder
from training.architecture import (
    BOUNDARY_RATIO,
    EXPERTS,
    VARIANTS,
    build_expert,
    build_scheduler,
    build_text_encoder,
    build_vae,
)
from training.checkpoints import RUNS, read_average
from training.experts import checkpoint_of
from training.text import FOLDER as TEXT_FOLDER
from training.text import build_tokenizer

MAX_FILE_BYTES = 16 * 2**20

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-video
---

# tiny

A two-expert Wan2.2 image-to-video pipeline of 10 million parameters, trained from random weights by TempoQuant's
`training/` on procedural videos of coloured shapes. For tests and demonstrations of quantization.
"""

# This model's sampling, as far as it differs from Wan2.2's own sizes (see
# tempoquant.models.sampling_settings).
SAMPLING = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "num_steps": 20,
    "guidance_scale": 2.5,
    "flow_shift": None,
    "fps": 8,
}


def to_shipped_dtype(expert: WanTransformer3DModel) -> WanTransformer3DModel:
    """Convert to bfloat16, except the parts that diffusers itself keeps in float32
    (`_keep_in_fp32_modules`), as Wan2.2 ships.
    """
    keep = expert._keep_in_fp32_modules
    for name, parameter in expert.named_parameters():
        kept = any(word in name.split(".") for word in keep)
        parameter.data = parameter.data.to(torch.float32 if kept else torch.bfloat16)
    return expert


def expert_from(weights: dict[str, Tensor] | None, variant: str = "tiny") -> WanTransformer3DModel:
    """Build an expert with the given weights, or random ones, in the shipped dtypes."""
    expert = build_expert(VARIANTS[variant])
    if weights is not None:
        expert.load_state_dict(weights)
    return to_shipped_dtype(expert.eval())


def write_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    experts: dict[str, WanTransformer3DModel],
) -> None:
    """Replace `folder` by a complete pipeline, and check the size of its files."""
    pipeline = WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scheduler=build_scheduler(),
        boundary_ratio=BOUNDARY_RATIO,
        **experts,
    )
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    _name_tokenizer_class(unfinished)
    _forget_origins(unfinished)
    (unfinished / "sampling.json").write_text(json.dumps(SAMPLING, indent=2) + "\n", encoding="utf-8")
    for file in unfinished.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
        if file.stat().st_size > MAX_FILE_BYTES:
            raise RuntimeError(f"{file} has {file.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
    (unfinished / "README.md").write_text(CARD, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _name_tokenizer_class(folder: Path) -> None:
    """Name a tokenizer class that transformers 4 and 5 both know; transformers 5 writes one that 4
    does not.
    """
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = folder / "tokenizer" / "tokenizer_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _forget_origins(folder: Path) -> None:
    """Drop `_name_or_path`, the folder of this machine that a part was loaded from."""
    for path in folder.glob("*/config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def untrained(folder: Path) -> None:
    """Write random weights everywhere, seed 0."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    experts = {name: expert_from(None) for name in EXPERTS.values()}
    write_pipeline(folder, build_vae().eval(), tokenizer, build_text_encoder(len(tokenizer)).eval(), experts)


def trained(folder: Path, variant: str = "tiny") -> None:
    """Write the averaged weights of the training runs in runs/."""
    experts = {
        component: expert_from(read_average(checkpoint_of(name, variant)), variant)
        for name, component in EXPERTS.items()
    }
    write_pipeline(
        folder,
        AutoencoderKLWan.from_pretrained(RUNS / "vae" / "model"),
        PreTrainedTokenizerFast.from_pretrained(TEXT_FOLDER / "tokenizer"),
        UMT5EncoderModel.from_pretrained(TEXT_FOLDER / "text_encoder"),
        experts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--untrained", type=Path, metavar="FOLDER", help="write random weights there instead")
    parser.add_argument("--variant", choices=VARIANTS, default="tiny", help="which pair of experts")
    parser.add_argument("--folder", type=Path, help="the package's own when left out, runs/VARIANT for another variant")
    arguments = parser.parse_args()
    folder = arguments.folder or (weights_folder() if arguments.variant == "tiny" else RUNS / arguments.variant)
    if arguments.untrained is not None:
        untrained(arguments.untrained)
    else:
        trained(folder, arguments.variant)


if __name__ == "__main__":
    main()
