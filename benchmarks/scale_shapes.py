"""Shapes for `benchmarks.scale`: those of a published denoiser, and random inputs of its calls."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch.utils import _pytree as pytree

from tempoquant.models.family import ModelFamily, PipelineIndex
from tempoquant.models.generic.published import PUBLISHED
from tempoquant.models.hunyuan_video15.family import HUNYUAN_VIDEO15
from tempoquant.models.ltx2.family import LTX2
from tempoquant.models.ltx2.pipelines import TEXT_TO_VIDEO, TRANSFORMER, example_inputs
from tempoquant.models.ltx2.published import published_models
from tempoquant.models.minimax_h3.family import MINIMAX_H3
from tempoquant.models.wan.family import COMPONENTS, WAN
from tempoquant.models.wan.pipelines import IMAGE_TO_VIDEO
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, Denoiser

NUM_OUTLIERS = 4
NUM_TEXT_TOKENS = 512
BOUNDARY_RATIO = 0.9

CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 36,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}

_Inputs = Callable[[int, float, int], dict[str, Any]]


@dataclass(frozen=True)
class Shapes:
    """One denoiser.

    Attributes:
        title: for people.
        family: of it.
        pipeline: class of its pipeline.
        denoiser: its name, component and timesteps.
        config: of it.
        inputs: makes random inputs of one call from a seed, a timestep and a number of the video's
            (or the image's) tokens.
        depths: the key in the config of each list of blocks' length, in the order in which they
            run.
    """

    title: str
    family: ModelFamily
    pipeline: str
    denoiser: Denoiser
    config: Mapping[str, Any]
    inputs: _Inputs
    depths: tuple[str, ...] = ("num_layers",)

    @property
    def lists(self) -> dict[str, int]:
        """Return the number of blocks of each list of the published denoiser."""
        return {name: self.config[key] for name, key in zip(self.family.block_lists, self.depths, strict=True)}

    @property
    def class_name(self) -> str:
        """Return the denoiser's class."""
        return str(self.config["_class_name"])


def latent_shape(num_tokens: int, is_image: bool = False) -> tuple[int, int, int]:
    """Return frames, height and width of latents that make so many tokens: for 32,760 those of 81
    frames of 480 × 832, for an image's 4,096 those of 1024 × 1024.

    Raises ValueError if no latents with several rows of tokens do.
    """
    for frames in (1,) if is_image else (21, 16, 8, 4, 2, 1):
        if num_tokens % frames:
            continue
        area = num_tokens // frames
        near = [30] if area % 30 == 0 and area >= 900 else range(1, math.isqrt(area) + 1)
        rows = max(divisor for divisor in near if area % divisor == 0)
        if rows > 1:
            return frames, 2 * rows, 2 * (area // rows)
    raise ValueError(f"no latents make {num_tokens} tokens: take a multiple of 16.")


def _wan_inputs(seed: int, timestep: float, num_tokens: int) -> dict[str, Any]:
    """Make noise for the latents, their mask and their condition; a text with a few outlier
    channels.
    """
    generator = torch.Generator().manual_seed(seed)
    text = 0.1 * torch.randn(1, NUM_TEXT_TOKENS, CONFIG["text_dim"], generator=generator)
    text[..., :NUM_OUTLIERS] *= 30
    latents = torch.randn(1, CONFIG["in_channels"], *latent_shape(num_tokens), generator=generator)
    return {"hidden_states": latents, "timestep": torch.tensor([timestep]), "encoder_hidden_states": text}


def _ltx2_inputs(seed: int, timestep: float, num_tokens: int) -> dict[str, Any]:
    """Make noise for both streams; texts with a few outlier channels; places in order."""
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns = latent_shape(num_tokens)
    index = PipelineIndex(_NOWHERE, {"_class_name": TEXT_TO_VIDEO}, {})
    shapes = example_inputs(index, _LTX2_CONFIG, (frames, rows // 2, columns // 2))
    inputs: dict[str, Any] = {}
    for name, value in shapes.items():
        if not isinstance(value, torch.Tensor):
            inputs[name] = value
        elif "mask" in name:
            inputs[name] = torch.ones(value.shape, dtype=value.dtype)
        elif "hidden_states" in name:
            inputs[name] = torch.randn(value.shape, generator=generator)
            if "encoder" in name:
                inputs[name] *= 0.1
                inputs[name][..., :NUM_OUTLIERS] *= 30
        elif "coords" in name:
            inputs[name] = torch.arange(value.numel(), dtype=torch.float32).reshape(value.shape) / value.numel()
        else:
            inputs[name] = torch.full(value.shape, timestep)
    return inputs


def _example_inputs(family: ModelFamily, index: dict[str, Any], config: Mapping[str, Any], is_image: bool) -> _Inputs:
    """Make inputs from a family's example: random numbers, masks that leave nothing out, and rows
    of one sequence in order.
    """

    def inputs(seed: int, timestep: float, num_tokens: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        num_rows = 0

        def made(name: str, like: torch.Tensor) -> torch.Tensor:
            nonlocal num_rows
            if name == family.timestep_argument:
                told = (timestep - family.call.timestep_offset) / family.call.timestep_scale
                return torch.full(like.shape, told)
            if "mask" in name:
                return torch.ones(like.shape)
            if like.is_floating_point():
                dtype = like.dtype if like.dtype == torch.float64 else torch.float32
                return torch.randn(like.shape, generator=generator, dtype=dtype)
            if name.endswith("_indices") and not name.startswith("timestep"):
                num_rows += len(like)
                return torch.arange(num_rows - len(like), num_rows)
            return torch.zeros(like.shape, dtype=like.dtype)

        latents = latent_shape(num_tokens, is_image)
        shapes = family.example_inputs(PipelineIndex(_NOWHERE, index, {}), config, latents)
        return {
            name: pytree.tree_map_only(torch.Tensor, functools.partial(made, name), value)
            for name, value in shapes.items()
        }

    return inputs


def _published(family: ModelFamily, name: str, title: str) -> "Shapes":
    """Return a family's published model with one denoiser."""
    model = family.published_models()[name]
    _, class_name, config = model["models"]["transformer"]
    config = {"_class_name": class_name, **config}
    inputs = _example_inputs(family, model["index"], config, is_image=False)
    return Shapes(title, family, model["index"]["_class_name"], Denoiser("transformer", "transformer"), config, inputs)


def _image_model(name: str, title: str, depths: tuple[str, ...]) -> "Shapes":
    """Return a published image model of the generic family, with what its class sets by default."""
    (family,) = (each for each in PUBLISHED if name in each.published_models())
    model = family.published_models()[name]
    _, class_name, config = model["models"]["transformer"]
    parameters = inspect.signature(getattr(diffusers, class_name)).parameters.values()
    by_default = {each.name: each.default for each in parameters if each.default is not each.empty}
    config = {"_class_name": class_name, **by_default, **config}
    inputs = _example_inputs(family, model["index"], config, is_image=True)
    denoiser = Denoiser("transformer", "transformer")
    return Shapes(title, family, model["index"]["_class_name"], denoiser, config, inputs, depths)


_LTX2 = published_models()["ltx-2"]
_NOWHERE: Any = None
_LTX2_CONFIG: dict[str, Any] = {"_class_name": TRANSFORMER, **_LTX2["models"]["transformer"][2]}
_MOST = float(NUM_TRAIN_TIMESTEPS)

SHAPES = {
    "wan2.2-i2v-a14b": Shapes(
        "Wan2.2-I2V-A14B",
        WAN,
        IMAGE_TO_VIDEO,
        Denoiser("high_noise", COMPONENTS["high_noise"], (BOUNDARY_RATIO * _MOST, _MOST)),
        CONFIG,
        _wan_inputs,
    ),
    "ltx-2": Shapes("LTX-2", LTX2, TEXT_TO_VIDEO, Denoiser("transformer", "transformer"), _LTX2_CONFIG, _ltx2_inputs),
    "hunyuanvideo-1.5": _published(HUNYUAN_VIDEO15, "hunyuanvideo-1.5-480p-t2v", "HunyuanVideo-1.5"),
    "minimax-h3": _published(MINIMAX_H3, "minimax-h3", "MiniMax-H3"),
    "flux.1-dev": _image_model("flux.1-dev", "FLUX.1-dev", ("num_layers", "num_single_layers")),
    "qwen-image": _image_model("qwen-image", "Qwen-Image", ("num_layers",)),
    "z-image": _image_model("z-image", "Z-Image", ("n_refiner_layers", "n_refiner_layers", "n_layers")),
}
WAN_A14B = SHAPES["wan2.2-i2v-a14b"]
