"""The W4A4 linear in plain PyTorch. This *defines* the result: every faster kernel is held to it by a test.

    h = x · downᵀ
    y = Q(x / smoothing_factor − h · deflationᵀ − input_offset) · Q(R)ᵀ + h · upᵀ + bias

What a layer does not have is left out. Both operands of the first product are levels times scales, exact in float32;
sums run in float32 (float64 for float64 inputs). The result is rounded once, to the dtype of x.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from tempoquant.formats import Format, ScaleRule, from_codes, quantize_activation, scale_from_bytes, unpack


class LinearTensors(NamedTuple):
    """What one 4-bit linear reads.

    packed: (out, in / 2) uint8. scale: (out, groups · bytes per scale) uint8. tensor_scale: () float32 or None.
    smoothing_factor: (in,) or None. up: (out, rank), down: (rank, in), both or neither None; deflation: (in, rank) or
    None. input_offset: (in,) or None. bias: (out,) or None.
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


def dequantize_residual(tensors: LinearTensors, format: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Q(R): codes times scales, (out, in), exact in float32 and wider."""
    scale = scale_from_bytes(tensors.scale, format)
    if tensors.tensor_scale is not None:
        scale = scale * tensors.tensor_scale
    return from_codes(unpack(tensors.packed, format), scale.to(dtype), format)


def w4a4_linear(
    x: torch.Tensor,
    tensors: LinearTensors,
    format: Format,
    activation_scale_rule: ScaleRule,
    clip_ratio: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """The exact 4-bit linear.

    Args:
        x: (…, in), any float dtype.
        clip_ratio: multiplies each activation group's amax; a number, or broadcastable to (…, groups).

    Returns:
        (…, out) in the dtype of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    raw = x.to(dtype)
    hidden = None if tensors.down is None else functional.linear(raw, tensors.down.to(dtype))
    rounded = quantize_activation(quantizer_input(raw, hidden, tensors), format, activation_scale_rule, clip_ratio)
    bias = None if tensors.bias is None else tensors.bias.to(dtype)
    y = functional.linear(rounded, dequantize_residual(tensors, format, dtype), bias)
    if hidden is not None and tensors.up is not None:
        y = y + functional.linear(hidden, tensors.up.to(dtype))
    return y.to(x.dtype)


def quantizer_input(raw: torch.Tensor, hidden: torch.Tensor | None, tensors: LinearTensors) -> torch.Tensor:
    """What is rounded to four bits: the input smoothed, deflated and centred, as far as the layer does each.

    Args:
        raw: (…, in) float32 or float64.
        hidden: raw · downᵀ, (…, rank), in the same dtype; None without a branch.

    Returns:
        (…, in), same dtype.
    """
    x = raw if tensors.smoothing_factor is None else raw / tensors.smoothing_factor.to(raw.dtype)
    if tensors.deflation is not None and hidden is not None:
        x = x - functional.linear(hidden, tensors.deflation.to(raw.dtype))
    return x if tensors.input_offset is None else x - tensors.input_offset.to(raw.dtype)
