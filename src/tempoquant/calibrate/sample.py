"""CalibrationSample: the inputs of one transformer call, one prompt at one timestep in one expert."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from tempoquant.timesteps import Expert

Branch = Literal["conditional", "unconditional"]


@dataclass(frozen=True, eq=False)
class CalibrationSample:
    """One recorded transformer call.

    Attributes:
        prompt_id: which prompt was sampled.
        expert: whose call it was.
        timestep: 0 clean … 1000 noise.
        step_index: position in the sampling loop.
        branch: which of the two calls of classifier-free guidance.
        inputs: keyword tensors of the call, batch 1, on the CPU.
        noise_prediction: what the recorded model answered, on the CPU.
    """

    prompt_id: str
    expert: Expert
    timestep: float
    step_index: int
    branch: Branch
    inputs: dict[str, torch.Tensor]
    noise_prediction: torch.Tensor


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """What a recipe reads: one list feeds smoothing and Hessians, the other the clip search.

    Attributes:
        statistics: conditional calls of every calibration prompt, sampled without guidance.
        clip_search: calls of both guidance branches of the first prompt(s).
    """

    statistics: list[CalibrationSample] = field(default_factory=list)
    clip_search: list[CalibrationSample] = field(default_factory=list)

    def of(self, expert: Expert) -> "CalibrationSet":
        """The samples of one expert."""
        return CalibrationSet(
            [sample for sample in self.statistics if sample.expert is expert],
            [sample for sample in self.clip_search if sample.expert is expert],
        )

    def timesteps(self, expert: Expert) -> list[float]:
        """The distinct timesteps at which an expert was called, noisiest first."""
        return sorted({s.timestep for s in self.statistics + self.clip_search if s.expert is expert}, reverse=True)
