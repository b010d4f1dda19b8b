"""LTX-2's pipelines: their arguments, their scheduler's settings, and the published model's
sampling.
"""

import functools
import logging
from typing import Any

import numpy as np
import torch
from diffusers.utils import is_av_available
from torch import nn

from tempoquant.errors import ModelError
from tempoquant.images import first_frame
from tempoquant.models.family import Config, PipelineIndex
from tempoquant.models.geometry import LatentGeometry
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.prompts import Prompt
from tempoquant.timesteps import Denoiser

TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "LTX2Pipeline", "LTX2ImageToVideoPipeline"
TRANSFORMER = "LTX2VideoTransformer3DModel"
TEXT_TOKENS = 1024
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
"""Sigmas of the distilled model's eight steps; the second stage takes the last three. Source:
diffusers.pipelines.ltx2.utils.
"""

_FPS = 24
_IMAGE_CRF = 33  # H.264's, used on the model's images in training; diffusers' default for LTX-2
_UNGUIDED = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "audio_guidance_rescale": 0.0,
}
_logger = logging.getLogger(__name__)


def denoisers(index: PipelineIndex) -> tuple[Denoiser, ...]:
    """Return the pipeline's only denoiser. Raises ModelError if it is missing, or of another
    class.
    """
    if index.components.get("transformer") != ("diffusers", TRANSFORMER):
        raise ModelError(f"{index.folder} has no {TRANSFORMER} as transformer, which its pipeline needs.")
    return (Denoiser("transformer", "transformer"),)


def geometry(denoiser: Config, autoencoder: Config) -> LatentGeometry:
    """Return the geometry of a video; the audio's tokens follow from its length."""
    pixels, frames = (autoencoder[f"{which}_compression_ratio"] for which in ("spatial", "temporal"))
    size = denoiser["patch_size"]
    return LatentGeometry(int(pixels), int(frames), (int(denoiser["patch_size_t"]), int(size), int(size)))


def width(denoiser: Config) -> int:
    """Return the features of a token of the video."""
    return int(denoiser["num_attention_heads"] * denoiser["attention_head_dim"])


def latent_channels(denoiser: Config) -> int:
    """Return the channels of a denoiser's prediction of the video."""
    return int(denoiser["out_channels"] or denoiser["in_channels"])


def autoencoder_channels(autoencoder: Config) -> int:
    """Return the channels of the video's latents."""
    return int(autoencoder["latent_channels"])


def takes_image(index: PipelineIndex) -> bool:
    """Return whether a pipeline's first frame is given."""
    return index.class_name == IMAGE_TO_VIDEO


def needs(index: PipelineIndex) -> tuple[str, ...]:
    """Return the inputs that a prompt needs beside its text."""
    return ("image",) if takes_image(index) else ()


def arguments(index: PipelineIndex, prompt: Prompt, settings: SamplingSettings) -> dict[str, Any]:
    """Return a pipeline's arguments for one prompt, beside texts, size, steps and noise."""
    found: dict[str, Any] = {"frame_rate": float(settings.fps)}
    if settings.guidance_scale <= 1:  # without any guidance, as a distilled model samples
        found |= _UNGUIDED
    if takes_image(index):
        assert prompt.image is not None  # `needs` has it
        found["image"] = first_frame(prompt.image, settings.width, settings.height)
        found["image_crf"] = _compression()
    return found


@functools.cache
def _compression() -> int:
    """Return the CRF of the image's compression; 0 for none without PyAV, which is logged once."""
    if is_av_available():
        return _IMAGE_CRF
    _logger.warning(
        "PyAV is not installed, so the image is given as it is, and not compressed first as in training: pip install "
        "av."
    )
    return 0


def set_timesteps(
    index: PipelineIndex, scheduler: Any, settings: SamplingSettings, latents: tuple[int, int, int]
) -> None:
    """Set a scheduler's timesteps as the pipelines do: shifted by the number of tokens of a video,
    if it says so.
    """
    num_steps, config = settings.num_steps, scheduler.config
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps) if settings.sigmas is None else list(settings.sigmas)
    shifts = [config.get("base_shift", 0.95), config.get("max_shift", 2.05)]
    lengths = [config.get("base_image_seq_len", 1024), config.get("max_image_seq_len", 4096)]
    slope = (shifts[1] - shifts[0]) / (lengths[1] - lengths[0])
    num_tokens = latents[0] * latents[1] * latents[2]
    scheduler.set_timesteps(sigmas=sigmas, mu=shifts[0] + slope * (num_tokens - lengths[0]))


def encoded_text(pipeline: Any, text: str, num_tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a text's embedding and mask, by the names of the pipeline's arguments."""
    embedding, mask, _, _ = pipeline.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=num_tokens, device=device
    )
    return {"prompt_embeds": embedding, "prompt_attention_mask": mask}


def example_inputs(index: PipelineIndex, denoiser: Config, latents: tuple[int, int, int]) -> dict[str, Any]:
    """Return the inputs of one call, on the meta device, for latents of a shape (frames, rows,
    columns).

    The audio is as long as the video at 24 frames a second.
    """

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    frames, rows, columns = latents
    num_tokens = frames * rows * columns
    seconds = (denoiser["vae_scale_factors"][0] * (frames - 1) + 1) / _FPS
    rate = denoiser["audio_sampling_rate"] / denoiser["audio_hop_length"] / denoiser["audio_scale_factor"]
    num_audio = round(seconds * rate) if frames else 0
    widths = [denoiser["caption_channels"]] * 2
    if not denoiser.get("use_prompt_embeddings", True):
        widths = [denoiser["cross_attention_dim"], denoiser["audio_cross_attention_dim"]]
    time = torch.empty(1, device="meta")
    by_token = takes_image(index)
    return {
        "hidden_states": empty(1, num_tokens, denoiser["in_channels"]),
        "audio_hidden_states": empty(1, num_audio, denoiser["audio_in_channels"]),
        "encoder_hidden_states": empty(1, TEXT_TOKENS, widths[0]),
        "audio_encoder_hidden_states": empty(1, TEXT_TOKENS, widths[1]),
        "timestep": torch.empty(1, num_tokens, device="meta") if by_token else time,
        **({"audio_timestep": time} if by_token else {}),
        "sigma": time,
        "encoder_attention_mask": empty(1, TEXT_TOKENS, dtype=torch.int64),
        "audio_encoder_attention_mask": empty(1, TEXT_TOKENS, dtype=torch.int64),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "fps": float(_FPS),
        "audio_num_frames": num_audio,
        "video_coords": empty(1, 3, num_tokens, 2, dtype=torch.float32),
        "audio_coords": empty(1, 1, num_audio, 2, dtype=torch.float32),
        "use_cross_timestep": True,
    }


def published(index: PipelineIndex) -> tuple[str, SamplingSettings]:
    """Return the name of the published model that a pipeline resembles, and its sampling.

    Source: the model card of Lightricks/LTX-2, and diffusers' examples.
    """
    return "LTX-2", SamplingSettings(512, 768, 121, 40, 4.0, None, _FPS)


def title(index: PipelineIndex) -> str:
    """Return a pipeline's title for a model card."""
    return f"LTX-2 {'image' if takes_image(index) else 'text'}-to-video pipeline"


def shortened(denoiser: Config, num_blocks: int) -> dict[str, Any]:
    """Return a config with at most so many blocks."""
    return {**denoiser, "num_layers": min(num_blocks, int(denoiser["num_layers"]))}


def call_text_encoder(encoder: nn.Module, embedded: torch.Tensor, mask: torch.Tensor) -> Any:
    """Call Gemma as the pipeline does: with the output of every layer, and with the scores of the
    next word.

    Its masks are made of values, which do not exist here: of all its allocations, only the masks
    are left out.
    """
    return encoder(inputs_embeds=embedded, output_hidden_states=True)


def all_layers(config: Config, num_blocks: int) -> dict[str, Any]:
    """Return no change of the text encoder's config: the pipeline keeps the output of every
    layer.
    """
    return {}
