"""The W4A4 linear in plain PyTorch. This *defines* the result: every faster kernel is held to it by a test.

    h = x · downᵀ
    y = Q(H(x / smoothing_factor) − h · deflationᵀ − input_offset) · Q(R)ᵀ + h · upᵀ + bias

H is the block rotation (`formats.rotation`). What a layer does not have is left out. Both operands of the first product
are levels times scales, exact in float32; sums run in float32 (float64 for float64 inputs). The result is rounded once,
to the dtype of x.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch.nn import functional

from tempoquant.formats import (
    Format,
    ScaleRule,
    from_codes,
    quantize_activation,
    quantize_activation_to_8_bits,
    rotate,
    scale_from_bytes,
    unpack,
)

NUMBERS_AT_ONCE = 2**22
"""Of inputs or outputs: in float32 16 MiB, of which rounding to the nearest level needs about ten at a time."""


class LinearTensors(NamedTuple):
    """What one 4-bit linear reads.

    packed: (out, in / 2) uint8. scale: (out, groups · bytes per scale) uint8. tensor_scale: () float32 or None.
    smoothing_factor: (in,) or None. up: (out, rank), down: (rank, in), both or neither None; deflation: (in, rank) or
    None. input_offset: (in,) or None. bias: (out,) or None. rotated: whether the smoothed input is rotated; then the
    weight, `deflation` and `input_offset` are of the rotated features.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor | None
    smoothing_factor: torch.Tensor | None
    up: torch.Tensor | None
    down: torch.Tensor | None
    deflation: torch.Tensor | None
    input_offset: torch.Tensor | None
    bias: torch.Tensor | None
    rotated: bool = False


def dequantize_residual(tensors: LinearTensors, format: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Q(R): codes times scales, (out, in), exact in float32 and wider."""
    scale = scale_from_bytes(tensors.scale, format)
    if tensors.tensor_scale is not None:
        scale = scale * tensors.tensor_scale
    return from_codes(unpack(tensors.packed, format), scale.to(dtype), format)


def effective_weight(tensors: LinearTensors, format: Format) -> torch.Tensor:
    """The dense weight that a layer stands for, smoothing, rotation and branch included: (out, in) float32."""
    residual = dequantize_residual(tensors, format)
    weight = rotate(residual) if tensors.rotated else residual
    weight = weight if tensors.smoothing_factor is None else weight / tensors.smoothing_factor.float()
    if tensors.up is None or tensors.down is None:
        return weight
    up = tensors.up.float()
    if tensors.deflation is not None:
        up = up - residual @ tensors.deflation.float()
    return weight + up @ tensors.down.float()


def w4a4_linear(
    x: torch.Tensor,
    tensors: LinearTensors,
    format: Format,
    activation_scale_rule: ScaleRule,
    clip_ratio: torch.Tensor | float = 1.0,
    eight_bits: torch.Tensor | bool = False,
) -> torch.Tensor:
    """The exact 4-bit linear. Long inputs are computed some tokens at a time, for rounding takes memory.

    Rounding has no gradient: `runtime.straight_through` gives a layer the one that training wants.

    Args:
        x: (…, in), any float dtype.
        clip_ratio: multiplies each activation group's amax; a number, or broadcastable to (…, groups).
        eight_bits: whether activations have eight bits instead, and no clip ratio (W4A8); a boolean, or booleans
            broadcastable to (…, 1).

    Returns:
        (…, out) in the dtype of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize_residual(tensors, format, dtype)
    bias = None if tensors.bias is None else tensors.bias.to(dtype)

    def compute(x: torch.Tensor, clip_ratio: torch.Tensor | float, eight_bits: torch.Tensor | bool) -> torch.Tensor:
        raw = x.to(dtype)
        hidden = None if tensors.down is None else functional.linear(raw, tensors.down.to(dtype))
        rounded = round_input(
            quantizer_input(raw, hidden, tensors), format, activation_scale_rule, clip_ratio, eight_bits
        )
        y = functional.linear(rounded, weight, bias)
        if hidden is not None and tensors.up is not None:
            y = y + functional.linear(hidden, tensors.up.to(dtype))
        return y.to(x.dtype)

    widest = max(weight.shape)
    if x.dim() < 2 or x.numel() // x.shape[-1] * widest <= NUMBERS_AT_ONCE:
        return compute(x, clip_ratio, eight_bits)
    chunks = _token_chunks(x, widest, clip_ratio, eight_bits)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
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
    """Q of the module's formula: (…, in) to the same, in four bits or, where `eight_bits` says so, in eight."""
    if isinstance(eight_bits, bool):
        if eight_bits:
            return quantize_activation_to_8_bits(x, format)
        return quantize_activation(x, format, rule, clip_ratio)
    in_four = quantize_activation(x, format, rule, clip_ratio)
    return torch.where(eight_bits, quantize_activation_to_8_bits(x, format), in_four)


def quantizer_input(raw: torch.Tensor, hidden: torch.Tensor | None, tensors: LinearTensors) -> torch.Tensor:
    """What is rounded to four bits: the input smoothed, rotated, deflated, centred, as far as the layer does each.

    Args:
        raw: (…, in) float32 or float64.
        hidden: raw · downᵀ, (…, rank), in the same dtype; None without a branch.

    Returns:
        (…, in), same dtype.
    """
    x = raw if tensors.smoothing_factor is None else raw / tensors.smoothing_factor.to(raw.dtype)
    if tensors.rotated:
        x = rotate(x)
    if tensors.deflation is not None and hidden is not None:
        x = x - functional.linear(hidden, tensors.deflation.to(raw.dtype))
    return x if tensors.input_offset is None else x - tensors.input_offset.to(raw.dtype)


_Chunk = tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | bool]
_Value = TypeVar("_Value", torch.Tensor | float, torch.Tensor | bool)


def _token_chunks(
    x: torch.Tensor, widest: int, clip_ratio: torch.Tensor | float, eight_bits: torch.Tensor | bool
) -> Iterator[tuple[slice, _Chunk]]:
    """Runs of tokens along the last dimension but one, with what belongs to them."""
    num_tokens = x.shape[-2]
    size = max(1, NUMBERS_AT_ONCE * num_tokens * x.shape[-1] // (x.numel() * widest))
    for start in range(0, num_tokens, size):
        tokens = slice(start, min(start + size, num_tokens))
        yield tokens, (x[..., tokens, :], _of_tokens(clip_ratio, tokens), _of_tokens(eight_bits, tokens))


def _of_tokens(value: _Value, tokens: slice) -> _Value:
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-2] > 1:
        return value[..., tokens, :]
    return value
