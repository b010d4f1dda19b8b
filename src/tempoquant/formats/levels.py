"""Numbers to 4-bit codes and back: nearest level, ties to the even code, saturation at the top (OCP MX v1.0)."""

import functools

import torch

from tempoquant.formats.format import Format


@functools.lru_cache
def _thresholds(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The largest magnitude that still rounds down, between each pair of neighbouring levels; shape (7,).

    A midpoint belongs to the even code: below an even code it must round down (so the midpoint itself is the largest
    that does), below an odd code it must round up (so the largest that rounds down is the next number under it).
    """
    table = torch.tensor(levels, dtype=dtype)
    midpoints = (table[1:] + table[:-1]) / 2
    below = torch.nextafter(midpoints, torch.zeros_like(midpoints))
    lower_code_is_even = torch.arange(len(levels) - 1) % 2 == 0
    return torch.where(lower_code_is_even, midpoints, below).to(device)


@functools.lru_cache
def _signed_levels(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The value of every code, looked up at code + 8; shape (16,). Code −8 is never written and means −levels[7]."""
    positive = list(levels)
    return torch.tensor([-levels[-1], *[-x for x in reversed(positive[1:])], *positive], dtype=dtype, device=device)


def encode(scaled: torch.Tensor, format: Format) -> torch.Tensor:
    """Codes of numbers already divided by their scale.

    Args:
        scaled: any shape, float32 or float64.

    Returns:
        int8 codes in −7 … 7 of the same shape. NaN must have been refused before.
    """
    thresholds = _thresholds(format.levels, scaled.dtype, scaled.device)
    magnitude = torch.bucketize(scaled.abs(), thresholds, out_int32=True).to(torch.int8)
    return torch.where(scaled < 0, -magnitude, magnitude)


def decode(codes: torch.Tensor, format: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The level each int8 code means, in units of its scale; same shape, exact in any float dtype of 8 bits or more."""
    table = _signed_levels(format.levels, dtype, codes.device)
    return table[codes.to(torch.int32) + 8]
