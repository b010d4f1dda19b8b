"""The W4A4 linear in plain PyTorch. It *defines* the result: a test compares every faster kernel
with it.

    y = Q(z) · Q(R)ᵀ + h · upᵀ + bias

`InputTransform` makes z and h from x. A layer leaves out the terms that it does not have. Both
operands of the first product are levels times scales, exact in float32; sums run in float32
(float64 for float64 inputs). The result is rounded once, to the dtype of x.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch

from tempoquant.exact_products import exact_linear
from tempoquant.formats import (
    Format,
    ScaleRule,
    from_codes,
    quantize_activation,
    quantize_activation_to_8_bits,
    scale_from_bytes,
    unpack,
)
from tempoquant.input_transform import InputTransform

NUMBERS_AT_ONCE = 2**22
"""The numbers of inputs or outputs at once: 16 MiB in float32, and rounding to the nearest level
needs about ten such copies.
"""


class WeightTensors(NamedTuple):
    """The weight of a 4-bit linear, its branch's up, and its bias.

    Attributes:
        packed: (out, in / 2) uint8, of the residual weight; of the rotated one if the input is
            rotated.
        scale: (out, groups · bytes per scale) uint8.
        tensor_scale: () float32, or None.
        up: (out, rank), or None without a branch.
        bias: (out,), or None.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor | None = None
    up: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def dequantize_residual(weight: WeightTensors, format: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return Q(R): codes times scales, (out, in), exact in float32 and wider."""
    scale = scale_from_bytes(weight.scale, format)
    if weight.tensor_scale is not None:
        scale = scale * weight.tensor_scale
    return from_codes(unpack(weight.packed, format), scale.to(dtype), format)


def effective_weight(transform: InputTransform, weight: WeightTensors, format: Format) -> torch.Tensor:
    """Return the layer's dense weight, smoothing, rotation and branch included: (out, in)
    float32.
    """
    residual = dequantize_residual(weight, format)
    dense = transform.rotate(residual)
    dense = dense if transform.smoothing_factor is None else dense / transform.smoothing_factor.float()
    if weight.up is None or transform.down is None:
        return dense
    up = weight.up.float()
    if transform.deflation is not None:
        up = up - exact_linear(residual, transform.deflation.float().T)
    return dense + exact_linear(up, transform.down.float().T)


def w4a4_linear(
    x: torch.Tensor,
    transform: InputTransform,
    weight: WeightTensors,
    format: Format,
    activation_scale_rule: ScaleRule,
    clip_ratio: torch.Tensor | float = 1.0,
    eight_bits: torch.Tensor | bool = False,
) -> torch.Tensor:
    """Compute the exact 4-bit linear, some tokens at a time, since rounding takes memory.

    Rounding has no gradient; `runtime.straight_through` defines the one for training.

    Args:
        x: (…, in), any float dtype.
        transform, weight: of one timestep bin.
        clip_ratio: multiplies each activation group's amax; a number, or broadcastable to (…,
            groups).
        eight_bits: whether activations have eight bits instead, and no clip ratio (W4A8); a
            boolean, or booleans broadcastable to (…, 1).

    Returns:
        (…, out) in the dtype of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual = dequantize_residual(weight, format, dtype)
    bias = None if weight.bias is None else weight.bias.to(dtype)

    def compute(x: torch.Tensor, clip_ratio: torch.Tensor | float, eight_bits: torch.Tensor | bool) -> torch.Tensor:
        raw = x.to(dtype)
        hidden = transform.hidden(raw)
        z = transform.quantizer_input(raw, hidden)
        y = exact_linear(round_input(z, format, activation_scale_rule, clip_ratio, eight_bits), residual, bias)
        if hidden is not None and weight.up is not None:
            y = y + exact_linear(hidden, weight.up.to(dtype))
        return y.to(x.dtype)

    widest = max(residual.shape)
    if x.dim() < 2 or x.numel() // x.shape[-1] * widest <= NUMBERS_AT_ONCE:
        return compute(x, clip_ratio, eight_bits)
    chunks = _token_chunks(x, widest, clip_ratio, eight_bits)
    y = x.new_empty(*x.shape[:-1], residual.shape[0])
    for tokens, chunk in chunks:
        y[..., tokens, :] = compute(*chunk)
    return y


def round_input(
    x: torch.Tensor,
    format: Format,
    rule: ScaleRule,
    clip_ratio: torch.Tensor | float = 1.0,
    eight_bits: torch.Tensor | bool = False,
) -> torch.Tensor:
    """Round an input as Q in the module's formula: (…, in) to the same, in four bits or, by
    `eight_bits`, in eight.
    """
    if isinstance(eight_bits, bool):
        if eight_bits:
            return quantize_activation_to_8_bits(x, format)
        return quantize_activation(x, format, rule, clip_ratio)
    in_four = quantize_activation(x, format, rule, clip_ratio)
    return torch.where(eight_bits, quantize_activation_to_8_bits(x, format), in_four)


_Chunk = tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | bool]
_Value = TypeVar("_Value", torch.Tensor | float, torch.Tensor | bool)


def _token_chunks(
    x: torch.Tensor, widest: int, clip_ratio: torch.Tensor | float, eight_bits: torch.Tensor | bool
) -> Iterator[tuple[slice, _Chunk]]:
    """Yield runs of tokens along the second-last dimension, with the arguments that belong to
    them.
    """
    num_tokens = x.shape[-2]
    size = max(1, NUMBERS_AT_ONCE * num_tokens * x.shape[-1] // (x.numel() * widest))
    for start in range(0, num_tokens, size):
        tokens = slice(start, min(start + size, num_tokens))
        yield tokens, (x[..., tokens, :], _of_tokens(clip_ratio, tokens), _of_tokens(eight_bits, tokens))


def _of_tokens(value: _Value, tokens: slice) -> _Value:
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-2] > 1:
        return value[..., tokens, :]
    return value
