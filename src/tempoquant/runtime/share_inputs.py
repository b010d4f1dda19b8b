"""Finds the linears of a model that may share a quantized input."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.runtime.shared_input import SharedInput

INPUT_TENSORS = ("smoothing_factor", "down", "deflation", "input_offset", "clip_ratio")
"""What a linear's input is quantized with. Linears share one when all of these are equal."""


def share_inputs(model: nn.Module, groups: Iterable[Sequence[str]]) -> int:
    """Let linears that read one input share its quantization, as far as they quantize it alike.

    Args:
        groups: names of linears that the model calls with the same tensor.

    Returns:
        How many quantizations a call of the model saves.
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
    a, b = one.entry, other.entry
    ways = [(entry.format, entry.activation_scale_rule, entry.rotated) for entry in (a, b)]
    if ways[0] != ways[1] or one.clock is not other.clock:
        return False
    pairs = [(getattr(one, key), getattr(other, key)) for key in INPUT_TENSORS]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
