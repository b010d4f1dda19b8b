"""Patches of ComfyUI's LoRA nodes for a 4-bit layer, as additions to its output; impossible
additions are refused.

A LoRA merged into a weight would have to be rounded to four bits with it, which would destroy
GPTQ's choice of codes. Beside the layer it is exact: y + strength · alpha/rank · (x · downᵀ) · upᵀ.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from tempoquant.errors import UnsupportedError

_REMEDY = "use a plain LoRA, or quantize again with the change in the weights (tempoquant quantize --lora)"


class Patch(NamedTuple):
    """One entry of ComfyUI's patches.

    Attributes:
        value: a weight adapter of ComfyUI (`name`, `weights`), or a tuple of a kind and its
            tensors.
        strength: multiplies the addition.
        strength_model: multiplies the weight itself; 1 for none.
        offset, function: of a part of the weight; None for all of it.
    """

    value: Any
    strength: float
    strength_model: float = 1.0
    offset: Any = None
    function: Any = None


class Addition(ABC):
    """An addition to a layer's output. ComfyUI moves it and counts its bytes."""

    @abstractmethod
    def move_to(self, device: torch.device) -> int:
        """Move its tensors; returns their bytes."""

    @abstractmethod
    def added(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the output y (…, out) of a layer with this addition, for its input x (…, in); y
        may be changed.
        """


class LoraBranch(Addition):
    """The addition factor · (x · downᵀ) · upᵀ.

    Args:
        up: (out, rank). down: (rank, in). factor: strength · alpha / rank.
    """

    def __init__(self, up: torch.Tensor, down: torch.Tensor, factor: float) -> None:
        self.up, self.down, self.factor = up, down, factor

    def move_to(self, device: torch.device) -> int:
        """Move both factors; returns their bytes."""
        self.up, self.down = self.up.to(device), self.down.to(device)
        return self.up.nbytes + self.down.nbytes

    def added(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y with the branch added, in the dtype of x."""
        hidden = x.reshape(-1, x.shape[-1]) @ self.down.to(x.device, x.dtype).T
        rows, up = y.reshape(-1, y.shape[-1]), self.up.to(x.device, x.dtype)
        total = torch.addmm(rows, hidden, up.T, alpha=self.factor)
        return total.reshape(y.shape)


class BiasChange(Addition):
    """The addition strength · difference. difference: (out,)."""

    def __init__(self, difference: torch.Tensor, strength: float) -> None:
        self.difference, self.strength = difference, strength

    def move_to(self, device: torch.device) -> int:
        """Move the difference; returns its bytes."""
        self.difference = self.difference.to(device)
        return self.difference.nbytes

    def added(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return y with the difference added, in the dtype of y."""
        return y + self.strength * self.difference.to(y.device, y.dtype)


def addition_to_weight(name: str, shape: tuple[int, int], patch: Patch, dtype: torch.dtype) -> Addition:
    """Return the branch for a patch of a 4-bit layer's weight.

    Args:
        name: the layer's.
        shape: (out, in) of its weight.
        dtype: of the layer's computation.

    Raises UnsupportedError, with the reason, for anything but a plain LoRA of this shape.
    """
    _require_whole(name, patch)
    kind = getattr(patch.value, "name", None)
    if kind is None:
        what = patch.value[0] if isinstance(patch.value, tuple) and patch.value else type(patch.value).__name__
        raise _refused(
            name, f"a whole difference ({what!r}) has no low rank and would have to be merged into 4-bit codes"
        )
    if kind != "lora":
        raise _refused(name, f"a {kind} is no plain LoRA and would have to be merged into 4-bit codes")
    up, down, alpha, core, dora_scale, reshape = patch.value.weights
    if dora_scale is not None:
        raise _refused(name, "DoRA scales the rows of the dense weight, which a 4-bit layer does not have")
    if core is not None or reshape is not None:
        raise _refused(name, "a LoRA with a core tensor or another shape is none of a linear")
    up, down = up.flatten(1), down.flatten(1)
    if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        found, wanted = f"{up.shape[0]} × {down.shape[1]}", f"{shape[0]} × {shape[1]}"
        raise _refused(name, f"the LoRA is for a layer of {found}, and this one is {wanted}: it is for another model")
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return LoraBranch(up.to(dtype), down.to(dtype), float(patch.strength) * scale)


def addition_to_bias(name: str, out_features: int, patch: Patch, dtype: torch.dtype) -> Addition:
    """Return the change of a 4-bit layer's bias. Raises UnsupportedError for anything but a
    difference of its shape.
    """
    _require_whole(name, patch)
    value = patch.value
    is_difference = isinstance(value, tuple) and len(value) == 2 and value[0] == "diff" and len(value[1]) == 1
    if not is_difference or tuple(value[1][0].shape) != (out_features,):
        raise _refused(name, "what changes its bias is no plain difference of its shape")
    return BiasChange(value[1][0].to(dtype), float(patch.strength))


def _require_whole(name: str, patch: Patch) -> None:
    if patch.strength_model != 1.0:
        raise _refused(name, "merging models changes dense weights, which a 4-bit layer does not have")
    if patch.offset is not None or patch.function is not None:
        raise _refused(name, "a change of a part of its weight would have to be merged into 4-bit codes")


def _refused(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"{name} has four bits and cannot be changed: {why}; {_REMEDY}.")
