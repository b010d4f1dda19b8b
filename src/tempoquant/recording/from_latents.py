"""Calibration samples without sampling: encoded clips, noised to the timesteps of the schedule.

No denoiser runs, so this takes seconds instead of hours and no memory for denoisers. In exchange,
the latents are those of real videos, not those on the model's own trajectory.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.device import compute_dtype
from tempoquant.errors import ModelError
from tempoquant.images import first_frame
from tempoquant.models.clips import read_clip
from tempoquant.models.family import ModelFamily
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import Step
from tempoquant.prompts import Prompt
from tempoquant.recording.plan import Calls


@torch.no_grad()
def noised_samples(
    pipeline: Any,
    family: ModelFamily,
    prompt: Prompt,
    settings: SamplingSettings,
    seed: int,
    steps: Sequence[Step],
    calls: Calls,
    texts: Mapping[str, torch.Tensor],
) -> Iterator[CalibrationSample]:
    """Yield the calls of one prompt, by step and branch, as the pipeline would make them on these
    latents.

    Args:
        pipeline: needs an autoencoder only.
        family: of the pipeline.
        prompt: its video is noised; without one, its image as a still video. Without an image, the
            video's first frame is the image.
        seed: of the noise, which is the same at every timestep, as along a trajectory.
        steps: of the sampling loop.
        calls: the calls to make.
        texts: guidance branch to text embeddings, (1, tokens, features).

    Raises:
        CalibrationError: the clip cannot be read, or is too short.
        ModelError: the schedule is not one of flow matching.
    """
    assert family.noised_calls is not None  # `require_prompts` has checked that
    clip = read_clip(prompt, settings)
    image = clip[0] if prompt.image is None else first_frame(prompt.image, settings.width, settings.height)
    call_at = family.noised_calls(pipeline, image, clip, settings, seed)
    dtype = compute_dtype(pipeline._execution_device.type)  # the denoisers' dtype, without a denoiser to ask
    for step_index, branch in sorted(calls):
        step = steps[step_index]
        if not 0 <= step.sigma <= 1:
            raise ModelError(
                f"the scheduler's sigma {step.sigma:g} is no share of noise: use a flow-matching scheduler."
            )
        inputs = call_at(step.timestep, step.sigma, texts[branch])
        casts = {key for key, value in inputs.items() if value.is_floating_point() and key != family.timestep_argument}
        yield CalibrationSample(
            prompt_id=prompt.id,
            denoiser=step.denoiser,
            timestep=float(step.timestep),
            step_index=step_index,
            guidance_branch=branch,
            inputs={key: value.to(dtype if key in casts else value.dtype).cpu() for key, value in inputs.items()},
        )
