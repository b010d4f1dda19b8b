"""HunyuanVideo-1.5's two pipelines: their conditions, text encoding, and sampling."""

import json
from typing import Any

import numpy as np
import torch
from torch import nn

from tempoquant.errors import ModelError
from tempoquant.images import first_frame
from tempoquant.models.family import Config, PipelineIndex
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.prompts import Prompt
from tempoquant.timesteps import Denoiser

TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"
DENOISER, DENOISER_CLASS = "transformer", "HunyuanVideo15Transformer3DModel"
_PIXELS, _FRAMES = 16, 4  # in one latent, where the autoencoder's config leaves its defaults out


def denoisers(index: PipelineIndex) -> tuple[Denoiser, ...]:
    """Return a pipeline's one denoiser. Raises ModelError if there is none of the class."""
    if index.components.get(DENOISER) != ("diffusers", DENOISER_CLASS):
        raise ModelError(f"{index.folder} has no {DENOISER_CLASS} as {DENOISER}: fetch the model again.")
    return (Denoiser(DENOISER, DENOISER),)


def takes_image(index: PipelineIndex) -> bool:
    """Return whether a pipeline encodes an image."""
    return index.class_name == IMAGE_TO_VIDEO


def needs(index: PipelineIndex) -> tuple[str, ...]:
    """Return the inputs that a prompt needs beside its text."""
    return ("image",) if takes_image(index) else ()


def arguments(index: PipelineIndex, prompt: Prompt, settings: SamplingSettings) -> dict[str, Any]:
    """Return a pipeline's arguments for one prompt, beside texts, size, steps and noise.

    Image-to-video takes its size from the image, so the image is cropped to the video's.
    """
    if prompt.image is None or not takes_image(index):
        return {}
    return {"image": first_frame(prompt.image, settings.width, settings.height)}


def geometry(denoiser: Config, autoencoder: Config) -> LatentGeometry:
    """Return the geometry of a video."""
    side = int(denoiser["patch_size"])
    return LatentGeometry(
        autoencoder.get("spatial_compression_ratio") or _PIXELS,
        autoencoder.get("temporal_compression_ratio") or _FRAMES,
        (int(denoiser["patch_size_t"]), side, side),
    )


def geometry_by_image(denoiser: Config, autoencoder: Config) -> LatentGeometry:
    """Return the same for image-to-video, which chooses among a few sizes by the image's shape and
    `target_size`.
    """
    own = geometry(denoiser, autoencoder)
    target_size = int(denoiser["target_size"])

    def size_for(height: int, width: int) -> tuple[int, int]:
        from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

        processor = HunyuanVideo15ImageProcessor(vae_scale_factor=own.pixels)
        found = processor.calculate_default_height_width(height, width, target_size)
        return int(found[0]), int(found[1])

    return LatentGeometry(own.pixels, own.frames, own.patch, size_for=size_for)


def set_timesteps(
    _index: PipelineIndex, scheduler: Any, settings: SamplingSettings, _latents: tuple[int, int, int]
) -> None:
    """Set a scheduler's timesteps as the pipelines do: sigmas from 1 down in equal steps, without
    the last, 0.
    """
    sigmas = np.linspace(1.0, 0.0, settings.num_steps + 1)[:-1] if settings.sigmas is None else list(settings.sigmas)
    scheduler.set_timesteps(sigmas=sigmas)


_TEXT_ARGUMENTS = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")


def encoded_text(pipeline: Any, text: str, _num_tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return both text encoders' embeddings of a text, and their masks, by the names of the
    pipeline's arguments.
    """
    return dict(zip(_TEXT_ARGUMENTS, pipeline.encode_prompt(text, device=device), strict=True))


_P480, _P720 = 640, 960
"""The sizes in denoisers' configs: the side of a square with as many pixels."""
_SIZES = {_P480: (480, 848), _P720: (720, 1280)}
_FLOW_SHIFTS = {
    (TEXT_TO_VIDEO, _P480): 5.0,
    (IMAGE_TO_VIDEO, _P480): 5.0,
    (TEXT_TO_VIDEO, _P720): 9.0,
    (IMAGE_TO_VIDEO, _P720): 7.0,
}
_GUIDANCE_SCALE = 6.0  # of the models that are not distilled


def published(index: PipelineIndex) -> tuple[str, SamplingSettings]:
    """Return the name of the published model that a pipeline resembles, and its sampling.

    Source: diffusers' scripts/convert_hunyuan_video1_5_to_diffusers.py. A folder's own configs tell
    which of the published models it resembles, and its guidance scale. A model that is known by
    name has its size in its index.
    """
    stored = _stored(index, DENOISER, "config.json") or index.values
    target_size = stored.get("target_size")
    size = _P720 if target_size == _P720 else _P480
    scale = _stored(index, "guider", "guider_config.json").get("guidance_scale", _GUIDANCE_SCALE)
    height, width = _SIZES[size]
    shift = _FLOW_SHIFTS[index.class_name, size]
    name = f"HunyuanVideo-1.5 {'480p' if size == _P480 else '720p'} {_kind(index)}"
    return name, SamplingSettings(height, width, 121, 50, float(scale), shift, 24)


def _stored(index: PipelineIndex, component: str, file: str) -> dict[str, Any]:
    """Return a component's config; empty for a pipeline without a folder, and for an unreadable
    config.
    """
    try:
        values = json.loads((index.folder / component / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _kind(index: PipelineIndex) -> str:
    return "image-to-video" if takes_image(index) else "text-to-video"


def title(index: PipelineIndex) -> str:
    """Return a pipeline's title for a model card."""
    return f"HunyuanVideo-1.5 {_kind(index)} pipeline"


def shortened_encoder(config: Config, num_blocks: int) -> dict[str, Any]:
    """Return no change: the pipelines read the output of every block of the text encoder, so each
    takes memory.
    """
    return {}


def call_encoder(encoder: nn.Module, embedded: torch.Tensor, mask: torch.Tensor) -> Any:
    """Call the text encoder as the pipelines do."""
    return encoder(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True)


def shortened(denoiser: Config, num_blocks: int) -> dict[str, Any]:
    """Return a config with at most so many blocks."""
    return {**denoiser, "num_layers": min(num_blocks, int(denoiser["num_layers"]))}
