"""CalibrationSample: the inputs of one transformer call, one prompt at one timestep in one
denoiser.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

GuidanceBranch = Literal["conditional", "unconditional"]


@dataclass(frozen=True, eq=False)
class CalibrationSample:
    """One recorded transformer call.

    Attributes:
        prompt_id: the prompt that was sampled.
        denoiser: the name of the denoiser that was called.
        timestep: 0 clean … 1000 noise.
        step_index: position in the sampling loop.
        guidance_branch: the side of classifier-free guidance: one of two calls a step, or one of
            two rows of a call.
        inputs: the call's arguments by name, batch 1, on the CPU: tensors, plain values, lists and
            tuples of these.
    """

    prompt_id: str
    denoiser: str
    timestep: float
    step_index: int
    guidance_branch: GuidanceBranch
    inputs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call and its answer, the reference for other models.

    Attributes:
        sample: the denoiser's inputs.
        noise_prediction: its output, on the CPU; for several streams all numbers, (1, numbers).
    """

    sample: CalibrationSample
    noise_prediction: torch.Tensor
