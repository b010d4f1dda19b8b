"""The change of one tensor by a LoRA file, and whether a weight's range holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tempoquant.errors import ModelError

_MOST_ADDED = torch.finfo(torch.float16).max  # to one weight; in practice a thousandth of it


@dataclass(frozen=True)
class Change:
    """The change of one tensor of `shape`: factor · up · down, or factor · up without a down.

    `up` and `down` are keys of the LoRA file, of shapes (out, rank) and (rank, in); a convolution's
    have further dimensions, which are 1 in `up`.
    """

    shape: tuple[int, ...]
    up: str
    down: str | None
    factor: float

    def delta(self, weights: Any, device: torch.device) -> torch.Tensor:
        """Compute the difference itself, float32, of `shape`. `weights` is the open LoRA file."""
        up = weights.get_tensor(self.up).to(device, torch.float32) * self.factor
        if self.down is None:
            return up
        down = weights.get_tensor(self.down).to(device, torch.float32)
        return (up.flatten(1) @ down.flatten(1)).reshape(self.shape)

    def bound(self, weights: Any) -> float:
        """Bound every entry of the difference without the product, by Cauchy and Schwarz."""
        up = weights.get_tensor(self.up).float()
        if not up.numel():
            return 0.0
        if self.down is None:
            return abs(self.factor) * float(up.abs().max())
        down = weights.get_tensor(self.down).float()
        return abs(self.factor) * float(up.flatten(1).norm(dim=1).max() * down.flatten(1).norm(dim=0).max())


def require_moderate(file: Path, weights: Any, changes: Mapping[str, tuple[Change, ...]], strength: float) -> None:
    """Raise ModelError unless everything that is added to a weight also fits float16.

    Products are computed only if the norms of their rows and columns allow an overflow, which no
    working LoRA does.
    """
    for name, change in ((name, change) for name, each in changes.items() for change in each):
        if abs(strength) * change.bound(weights) <= _MOST_ADDED:
            continue
        added = abs(strength) * float(change.delta(weights, torch.device("cpu")).abs().amax())
        if not added <= _MOST_ADDED:
            raise ModelError(
                f"{file.name} with strength {strength:g} adds {added:.3g} to a weight in {name}, more than float16 "
                "holds: give a smaller strength, or fetch the file again."
            )
