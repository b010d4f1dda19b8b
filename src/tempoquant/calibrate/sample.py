"""CalibrationSample: the inputs of one transformer call, one prompt at one timestep in one denoiser."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

GuidanceBranch = Literal["conditional", "unconditional"]


@dataclass(frozen=True, eq=False)
class CalibrationSample:
    """One recorded transformer call.

    Attributes:
        prompt_id: which prompt was sampled.
        denoiser: the name of the one that was called.
        timestep: 0 clean … 1000 noise.
        step_index: position in the sampling loop.
        guidance_branch: which side of classifier-free guidance: of two calls a step, or of two rows of one call.
        inputs: the call's arguments by name, batch 1, on the CPU: tensors, plain values, lists and tuples of these.
    """

    prompt_id: str
    denoiser: str
    timestep: float
    step_index: int
    guidance_branch: GuidanceBranch
    inputs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call and its answer, for measuring other models against the one that was recorded.

    Attributes:
        sample: what the denoiser was called with.
        noise_prediction: what it answered, on the CPU; of several streams all numbers, (1, numbers).
    """

    sample: CalibrationSample
    noise_prediction: torch.Tensor
