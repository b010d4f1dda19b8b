"""Encoding to 4-bit codes and decoding: nearest level, ties to the even code, saturation at the top
(OCP MX v1.0).

The levels of every format here form a small floating-point system: `step`, 2·`step`, … up to
`smallest_normal`; from there on the spacing doubles at each power of two (INT4's eight levels all
lie below their smallest normal). So hardware can round: adding a large number and subtracting it
again keeps exactly the bits of a level, and IEEE's ties to even are ties to the even code. A search
among the thresholds between levels gives the same codes about ten times slower; a test compares the
two.
"""

import functools
import math
from typing import NamedTuple

import torch

from tempoquant.errors import RecipeError
from tempoquant.formats.format import Format


class LevelGrid(NamedTuple):
    """The number from which the spacing of levels doubles, and the spacing below it; both are
    powers of two.
    """

    step: float
    smallest_normal: float


class _FloatLayout(NamedTuple):
    """A float's layout: the integer type of its width, the mask of its exponent bits, the number of
    mantissa bits.
    """

    integer: torch.dtype
    exponent_mask: int
    mantissa_bits: int


_FLOAT_LAYOUTS = {
    torch.float32: _FloatLayout(torch.int32, 0x7F800000, 23),
    torch.float64: _FloatLayout(torch.int64, 0x7FF0000000000000, 52),
}


@functools.lru_cache
def level_grid(levels: tuple[float, ...]) -> LevelGrid:
    """Return the floating-point system of the levels. Raises RecipeError if they form none."""
    step = levels[1]
    for ones in (2, 4, 8):  # levels in one binade: a mantissa of 1, 2 or 3 bits
        wanted = [step * (c if c < ones else (ones + c % ones) * 2.0 ** (c // ones - 1)) for c in range(len(levels))]
        if list(levels) == wanted and math.frexp(step)[0] == 0.5:
            return LevelGrid(step, step * ones)
    raise RecipeError(f"the levels {levels} are no floating-point system of 1 to 3 mantissa bits.")


@functools.lru_cache
def _code_of_multiple(levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return a table of codes, indexed by level / step as an unsigned byte; shape (256,), int8."""
    step = level_grid(levels).step
    table = [0] * 256
    for code, level in enumerate(levels):
        table[int(level / step)], table[-int(level / step)] = code, -code
    return torch.tensor(table, dtype=torch.int8, device=device)


@functools.lru_cache
def _signed_levels(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the value of every code, indexed by code + 8; shape (16,). Code −8 is never written
    and means −levels[7].
    """
    positive = list(levels)
    return torch.tensor([-levels[-1], *[-x for x in reversed(positive[1:])], *positive], dtype=dtype, device=device)


def nearest_level(scaled: torch.Tensor, format: Format) -> torch.Tensor:
    """Round numbers, already divided by their scale, to the nearest level.

    Args:
        scaled: any shape, float32 or float64.

    Returns:
        same shape and dtype, the same numbers as `decode(encode(scaled))`; NaN stays NaN.
    """
    step, smallest_normal = level_grid(format.levels)
    layout = _FLOAT_LAYOUTS[scaled.dtype]
    bounded = scaled.detach().clamp(-format.top_level, format.top_level)
    binade = bounded.view(layout.integer).bitwise_and(layout.exponent_mask).view(scaled.dtype)  # 2^⌊log₂ |v|⌋
    # The last bit of 1.5 · 2^mantissa_bits · s is worth s, whatever the sign of the small number
    # added to it.
    rounder = binade.clamp_(min=smallest_normal).mul_(1.5 * 2.0**layout.mantissa_bits * step / smallest_normal)
    return bounded.add_(rounder).sub_(rounder)


def encode(scaled: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the codes of numbers already divided by their scale.

    Args:
        scaled: any shape, float32 or float64.

    Returns:
        int8 codes in −7 … 7 of the same shape. The caller has refused NaN.
    """
    multiple = nearest_level(scaled, format).div_(level_grid(format.levels).step).to(torch.int8)
    index = multiple.view(torch.uint8).to(torch.int32).flatten()
    return _code_of_multiple(format.levels, scaled.device).index_select(0, index).view(scaled.shape)


def decode(codes: torch.Tensor, format: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the level of each int8 code, in units of its scale; same shape, exact in any float
    dtype of 8 bits or more.
    """
    table = _signed_levels(format.levels, dtype, codes.device)
    return table.index_select(0, (codes.to(torch.int32) + 8).flatten()).view(codes.shape)
