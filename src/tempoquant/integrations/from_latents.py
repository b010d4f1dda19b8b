"""Calibration samples without sampling: clips, encoded and noised to the timesteps of the schedule.

Flow matching's x_t = (1 − sigma) · x_0 + sigma · noise. No expert runs, which takes seconds instead of hours and needs
no memory for them; in exchange the latents are those of real videos, not those the model makes on its way.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import WanImageToVideoPipeline

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.errors import ModelError
from tempoquant.integrations.clips import read_clip
from tempoquant.integrations.recording_plan import Calls
from tempoquant.integrations.sampling import SamplingSettings, first_frame
from tempoquant.integrations.schedule import Step
from tempoquant.integrations.wan import compute_dtype
from tempoquant.prompts import Prompt


@torch.no_grad()
def noised_samples(
    pipeline: WanImageToVideoPipeline,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    steps: Sequence[Step],
    calls: Calls,
    texts: Mapping[str, torch.Tensor],
) -> Iterator[CalibrationSample]:
    """The calls of one prompt, by step and branch, as the pipeline would make them on these latents.

    Args:
        pipeline: needs an autoencoder only.
        prompt: its video is noised; without one its image, standing still.
        seed: of the noise, which is the same at every timestep, as along a trajectory.
        steps: of the sampling loop.
        calls: which to make.
        texts: guidance branch to text embeddings, (1, tokens, features).

    Raises:
        CalibrationError: the clip cannot be read, or is too short.
        ModelError: the schedule is not one of flow matching.
    """
    noise, condition = _noise_and_condition(pipeline, prompt, settings, seed)
    clean = _encode(pipeline, prompt, settings).to(noise)
    dtype = compute_dtype(noise.device.type)  # the experts', which are not here to ask
    for step_index, branch in sorted(calls):
        step = steps[step_index]
        if not 0 <= step.sigma <= 1:
            raise ModelError(
                f"the scheduler's sigma {step.sigma:g} is no share of noise: use a flow-matching scheduler."
            )
        latents = (1 - step.sigma) * clean + step.sigma * noise
        inputs = {
            "hidden_states": torch.cat([latents, condition], dim=1).to(dtype),
            "timestep": step.timestep,
            "encoder_hidden_states": texts[branch].to(dtype),
        }
        yield CalibrationSample(
            prompt_id=prompt.id,
            expert=step.expert,
            timestep=float(step.timestep),
            step_index=step_index,
            guidance_branch=branch,
            inputs={key: value.cpu() for key, value in inputs.items()},
        )


def _noise_and_condition(
    pipeline: WanImageToVideoPipeline, prompt: Prompt, settings: SamplingSettings, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (1, 16, t, h, w) and the channels that hold the first frame (1, 20, t, h, w), both float32."""
    device = pipeline._execution_device
    size = (settings.height, settings.width)
    image = pipeline.video_processor.preprocess(first_frame(prompt, settings), *size).to(device, torch.float32)
    generator = torch.Generator("cpu").manual_seed(seed)
    channels = pipeline.vae.config.z_dim
    noise, condition = pipeline.prepare_latents(
        image, 1, channels, *size, settings.num_frames, torch.float32, device, generator
    )
    return noise, condition


def _encode(pipeline: WanImageToVideoPipeline, prompt: Prompt, settings: SamplingSettings) -> torch.Tensor:
    """The clip's latents, (1, 16, t, h, w), of about unit variance in each channel."""
    vae = pipeline.vae
    frames = read_clip(prompt, settings)
    video = pipeline.video_processor.preprocess_video(frames, settings.height, settings.width)
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std
