"""Calls of a Wan denoiser: their shapes, and their content on a real clip's latents, noised without
sampling.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from tempoquant.models.family import Config, PipelineIndex
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.wan.pipelines import has_timestep_by_token

TEXT_TOKENS = 512
_IMAGE_TOKENS = 257  # of CLIP's ViT-H/14 at 224 × 224: 16 × 16 patches and the class token
_TOKEN_STEP = 2  # latents of a row, or column, in one token
_FRAMES = 4  # in one latent


def example_inputs(index: PipelineIndex, denoiser: Config, latents: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Return the inputs of one call, on the meta device, for latents of a shape (frames, rows,
    columns).

    The first frame of VACE's and Animate's is a given picture's.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    frames, rows, columns = latents
    num_tokens = frames * (rows // _TOKEN_STEP) * (columns // _TOKEN_STEP)
    inputs = {
        "hidden_states": empty(1, denoiser["in_channels"], *latents),
        "timestep": torch.empty((1, num_tokens) if has_timestep_by_token(index) else (1,), device="meta"),
        "encoder_hidden_states": empty(1, TEXT_TOKENS, denoiser["text_dim"]),
    }
    if denoiser.get("image_dim"):
        inputs["encoder_hidden_states_image"] = empty(1, _IMAGE_TOKENS, denoiser["image_dim"])
    if "vace_layers" in denoiser:
        inputs["control_hidden_states"] = empty(1, denoiser["vace_in_channels"], *latents)
        inputs["control_hidden_states_scale"] = empty(len(denoiser["vace_layers"]))
    if (size := denoiser.get("motion_encoder_size")) is not None:
        own = max(frames - 1, 0)
        inputs["pose_hidden_states"] = empty(1, denoiser["latent_channels"], own, rows, columns)
        inputs["face_pixel_values"] = empty(1, 3, max(_FRAMES * (own - 1) + 1, 0), size, size)
    return inputs


@torch.no_grad()
def noised_calls(
    pipeline: Any, image: Image.Image | None, frames: Sequence[Image.Image], settings: SamplingSettings, seed: int
) -> Callable[[torch.Tensor, float, torch.Tensor], dict[str, torch.Tensor]]:
    """Encode a clip, and return a function that makes a denoiser's inputs from it at a timestep.

    Flow matching's x_t = (1 − sigma) · x_0 + sigma · noise. The noise is the same at every
    timestep, as along a trajectory.

    Args:
        pipeline: needs an autoencoder, and an image encoder if its denoiser reads one.
        image: the first frame, of the video's size; None for a pipeline that takes none.
        frames: of the clip.
        seed: of the noise.

    Returns:
        A function of the timestep (a tensor of one element), its sigma, and the text's embedding
        (1, tokens, features).
    """
    noise, condition, is_noisy = _prepare(pipeline, image, settings, seed)
    clean = _encode(pipeline, frames, settings).to(noise)
    seen = None
    if image is not None and getattr(pipeline, "image_encoder", None) is not None:
        seen = pipeline.encode_image(image, pipeline._execution_device)

    def at(timestep: torch.Tensor, sigma: float, text: torch.Tensor) -> dict[str, torch.Tensor]:
        latents = (1 - sigma) * clean + sigma * noise
        if pipeline.config.expand_timesteps:
            if condition is not None and is_noisy is not None:
                latents = (1 - is_noisy) * condition + is_noisy * latents
            shares = torch.ones_like(latents[:, :1]) if is_noisy is None else is_noisy
            timestep = (shares[0][0][:, ::_TOKEN_STEP, ::_TOKEN_STEP].cpu() * timestep).flatten().unsqueeze(0)
        elif condition is not None:
            latents = torch.cat([latents, condition], dim=1)
        inputs = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text}
        return inputs if seen is None else {**inputs, "encoder_hidden_states_image": seen}

    return at


def _prepare(
    pipeline: Any, image: Image.Image | None, settings: SamplingSettings, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return noise (1, 16, t, h, w), the latents or channels that hold the first frame, and the
    mask of kept noise; float32.

    The last two are None if the pipeline has none.
    """
    device = pipeline._execution_device
    size = (settings.height, settings.width, settings.num_frames)
    generator = torch.Generator("cpu").manual_seed(seed)
    rest = (pipeline.vae.config.z_dim, *size, torch.float32, device, generator)
    if "image" not in inspect.signature(pipeline.prepare_latents).parameters:
        return pipeline.prepare_latents(1, *rest), None, None
    picture = pipeline.video_processor.preprocess(image, *size[:2]).to(device, torch.float32)
    noise, condition, *is_noisy = pipeline.prepare_latents(picture, 1, *rest)
    return noise, condition, is_noisy[0] if is_noisy else None


def _encode(pipeline: Any, frames: Sequence[Image.Image], settings: SamplingSettings) -> torch.Tensor:
    """Encode the clip's latents, (1, channels, t, h, w), of about unit variance in each channel."""
    vae = pipeline.vae
    video = pipeline.video_processor.preprocess_video(frames, settings.height, settings.width)
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std
