"""Activations in eight bits, for timesteps where four bits lose too much: the same 4-bit weights,
one scale a token.

Formats with floating-point levels (E2M1) take a power of two as the scale of a token, so that FP8
and bfloat16 hardware hold the same numbers exactly. INT4 takes any float32, since its hardware
multiplies integers.
"""

import torch

from tempoquant.formats.format import Format
from tempoquant.formats.scales import E4M3_MAX

INT8_MAX = 127.0


def quantize_activation_to_8_bits(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Round activations to FP8 E4M3 or, beside INT4 weights, to INT8, and back; one dynamic scale a
    token.

    A token of zeros has scale 1. One that holds NaN or Inf becomes NaN, as in four bits. Source:
    dynamic per-token FP8 and INT8, as in SmoothQuant (arXiv 2211.10438); only the power of two is
    ours.

    Args:
        x: (…, in) float32 or float64, already smoothed.
        format: of the weights.

    Returns:
        (…, in), same dtype.
    """
    scale = eight_bit_scale(x.abs().amax(-1, keepdim=True), format)
    if format.has_integer_levels:
        return (x / scale).round_().clamp_(-INT8_MAX, INT8_MAX).mul_(scale)
    rounded = (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return rounded.to(x.dtype).mul_(scale)


def eight_bit_scale(amax: torch.Tensor, format: Format) -> torch.Tensor:
    """Compute the scale of a token from its largest magnitude: same shape and dtype; NaN where that
    is not finite.
    """
    if format.has_integer_levels:
        scale = amax.float().div(INT8_MAX).clamp_(min=torch.finfo(torch.float32).tiny).to(amax.dtype)
    else:
        mantissa, exponent = torch.frexp(amax)
        exponent = exponent - 9 + (mantissa > E4M3_MAX / 512).to(exponent.dtype)  # 448 = 0.875 · 2^9
        scale = torch.ldexp(torch.ones_like(amax), exponent.clamp(-126, 127))
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    return torch.where(torch.isfinite(amax), scale, torch.full_like(scale, torch.nan))
