"""The guidance branch of a denoiser's call, or of each row of its batch; and its output as one
tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tempoquant.calibrate.arguments import tensors_in
from tempoquant.calibrate.sample import GuidanceBranch


class Part(NamedTuple):
    """One row of a call.

    Attributes:
        branch: of guidance.
        arguments: of the call, by name, batch 1.
        answer: of the call, batch 1.
    """

    branch: GuidanceBranch
    arguments: dict[str, Any]
    answer: Any


@dataclass(frozen=True)
class Guidance:
    """A pipeline's guidance: by several calls a step, or by several rows of one call.

    Attributes:
        calls: branches of a step's calls, in order, if each has one row. Further calls belong to
            other kinds of guidance, and are not calibrated on.
        rows: branches of the rows of a call that has as many.
    """

    calls: tuple[GuidanceBranch, ...] = ("conditional", "unconditional")
    rows: tuple[GuidanceBranch, ...] = ()

    def parts(self, arguments: Mapping[str, Any], answer: Any, num_calls: int) -> list[Part]:
        """Split a call by guidance.

        Args:
            arguments: by name, in the order in which the denoiser names them: the first is the
                latents.
            answer: the denoiser's output.
            num_calls: of this step, before this one.
        """
        latents = next(iter(arguments.values()))
        num_rows = len(latents) if isinstance(latents, list) else latents.shape[0]
        if num_rows == len(self.rows) and num_rows > 1:
            return [
                Part(
                    branch,
                    {name: _row(value, row, num_rows) for name, value in arguments.items()},
                    _row(answer, row, num_rows),
                )
                for row, branch in enumerate(self.rows)
            ]
        branches = self.calls[num_calls : num_calls + 1]
        return [Part(branch, dict(arguments), answer) for branch in branches]


def _row(value: Any, row: int, num_rows: int) -> Any:
    """Return one row of a batch: of tensors whose first dimension is the batch's, and of lists;
    everything else belongs to every row.
    """
    if isinstance(value, torch.Tensor):
        return value[row : row + 1].clone() if value.ndim and value.shape[0] == num_rows else value
    if isinstance(value, list) and len(value) == num_rows:
        return [value[row]]
    if isinstance(value, tuple):
        return tuple(_row(each, row, num_rows) for each in value)
    if isinstance(value, Mapping):
        return {key: _row(each, row, num_rows) for key, each in value.items()}
    return value


TWO_CALLS = Guidance()
"""A call with the text, then one without."""


def prediction_of(answer: Any) -> torch.Tensor:
    """Return a denoiser's prediction: its output tensor, or all numbers of several, (1,
    numbers).
    """
    tensors = tensors_in(answer)
    return tensors[0] if len(tensors) == 1 else torch.cat([each.flatten() for each in tensors]).unsqueeze(0)
