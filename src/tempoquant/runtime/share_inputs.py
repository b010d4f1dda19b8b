"""Detection of a model's linears that may share a quantized input."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.runtime.shared_input import SharedInput


def share_inputs(model: nn.Module, groups: Iterable[Sequence[str]]) -> int:
    """Let linears that read one input share its quantization, if they quantize it alike.

    Args:
        groups: names of linears that the model calls with the same tensor.

    Returns:
        The number of quantizations that a call of the model saves.
    """
    saved = 0
    for names in groups:
        linears = [model.get_submodule(name) for name in names]
        members = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
        if len(members) < 2 or not all(_quantize_alike(members[0], linear) for linear in members[1:]):
            continue
        shared = SharedInput(len(members))
        for linear in members:
            linear.shared_input = shared
        members[0].clock.shared_inputs.append(shared)
        saved += len(members) - 1

    return saved


def _quantize_alike(one: QuantizedLinear, other: QuantizedLinear) -> bool:
    """Return whether format, rule, transform and clip ratios are equal, and the clock is the
    same.
    """
    if one.clock is not other.clock:
        return False
    a, b = one.to_layer(), other.to_layer()
    if (a.format, a.activation_scale_rule) != (b.format, b.activation_scale_rule):
        return False
    pairs = zip((*a.input_transform, a.clip_ratio), (*b.input_transform, b.clip_ratio), strict=True)
    return all(_equal(x, y) for x, y in pairs)


def _equal(x: torch.Tensor | bool | None, y: torch.Tensor | bool | None) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return torch.equal(x, y)
    return x is y
