"""Scales of groups in a kernel, on their grid as `formats/` defines them, to the bit; what kernels
know of a format.

Exponents come out of float32's own bits; magnitudes are compared and bounded as integers, in whose
order NaN stands above infinity and infinity above every number. A division is IEEE's. Kernels that
call these must be compiled with `enable_fp_fusion=False`: a fused multiply-add rounds once where
the definition rounds twice.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tempoquant.formats import Format, ScaleGrid, ScaleRule, scales
from tempoquant.formats.levels import level_grid
from tempoquant.kernels.fp8_window import FP8_OCTAVES, FP8_TOP_EXPONENT
from tempoquant.kernels.triton_bits import (
    INFINITY_BITS,
    exponent_of,
    float_of_bits,
    magnitude_bits,
    power_of_two,
    rounded_to_bfloat16,
    to_bfloat16_grid,
)
from tempoquant.kernels.triton_division import divide

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
BFLOAT16_MAX = tl.constexpr(3.3895313892515355e38)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
E4M3_MAX = tl.constexpr(scales.E4M3_MAX)
E4M3_MAX_BITS = tl.constexpr(0x43E00000)
INTEGER_MAX_BITS = tl.constexpr(0x42FE0000)  # 127
E4M3_MIN = tl.constexpr(scales.E4M3_MIN)
E4M1_MAX = tl.constexpr(scales.E4M1_MAX)
E4M1_MIN = tl.constexpr(scales.E4M1_MIN)
USUAL_MAX = tl.constexpr(2.0**90)
USUAL_MIN = tl.constexpr(2.0**-90)


USUAL_EXPONENT = {ScaleGrid.E8M0: -5, ScaleGrid.E4M1: -1}
"""Of the power of two whose multiples FP8 rows are tried as. E4M1: relative to 1/2, FP8 holds every
scale from its least, 2^-8, to 16, and up to 16 the window of twelve octaves ends at or below 2^-8:
so such a row has nothing to wait for. E8M0: scales from 2^-13 to 2, what smoothing leaves.
"""


class Rounding(NamedTuple):
    """A format and a scale rule as kernels see them: numbers known when they are compiled.

    grid: the scale grid's name. is_integer: whether levels are integers. candidates: multiples of
    amax that are tried; is_floor: the rule "floor". octaves: the window of scales, or None.
    top_bits: the bits of the top level. mantissa_bits, exponent: those of the levels' small
    floating-point system, and of its smallest normal number. do_clip: of each candidate, whether
    integer levels clip a group's largest number while the clip ratio is at least 1.
    fp8_top_exponent, fp8_octaves: see `fp8_window`. usual_exponent: of the base that FP8 rows are
    tried with first. is_interpreted: whether Triton's interpreter runs the kernel, which cannot do
    all that the compiler can.
    """

    grid: str
    is_integer: bool
    group: int
    log2_group: int
    candidates: tuple[float, ...]
    largest_candidate: float
    is_floor: bool
    octaves: int | None
    top_bits: int
    top_level: float
    reciprocal_of_top: float
    mantissa_bits: int
    exponent: int
    do_clip: tuple[bool, ...]
    fp8_top_exponent: int
    fp8_octaves: int
    usual_exponent: int
    is_interpreted: bool


@functools.lru_cache
def rounding_of(format: Format, rule: ScaleRule) -> Rounding:
    """Return the kernels' view of a format and a rule."""
    candidates = format.scale_candidates if rule is ScaleRule.LEAST_ERROR else (1.0,)
    step, smallest_normal = level_grid(format.levels)
    return Rounding(
        grid=format.scale_grid.value,
        is_integer=format.has_integer_levels,
        group=format.group_size,
        log2_group=format.group_size.bit_length() - 1,
        candidates=candidates,
        largest_candidate=max(candidates),
        is_floor=rule is ScaleRule.FLOOR,
        octaves=format.scale_octaves,
        top_bits=int(torch.tensor(format.top_level).view(torch.int32)),
        top_level=format.top_level,
        reciprocal_of_top=float(torch.tensor(format.top_level).reciprocal()),
        mantissa_bits=int(math.log2(smallest_normal / step)),
        exponent=int(math.log2(smallest_normal)),
        do_clip=tuple(
            candidate * (format.top_level + 0.5) <= format.top_level * (1 + 2.0**-8) for candidate in candidates
        ),
        fp8_top_exponent=FP8_TOP_EXPONENT.get(format.scale_grid, 0),
        fp8_octaves=FP8_OCTAVES.get(format.scale_grid, 0),
        usual_exponent=USUAL_EXPONENT.get(format.scale_grid, 0),
        is_interpreted=not isinstance(row_base_exponent, triton.runtime.JITFunction),
    )


@triton.jit
def row_base_exponent(largest: tl.tensor, TOP_EXPONENT: tl.constexpr) -> tl.tensor:
    """Return the exponent of the power of two that puts a row's largest scale at 2^TOP_EXPONENT,
    itself a normal float32.
    """
    return tl.maximum(exponent_of(largest) - TOP_EXPONENT, -126)


@triton.jit
def round_magnitude(
    magnitude: tl.tensor, MANTISSA_BITS: tl.constexpr, EXPONENT: tl.constexpr, FORMAT: tl.constexpr
) -> tl.tensor:
    """Round to the nearest number of a small floating-point system, ties to even, as
    `formats.nearest_level` does.

    A magnitude is not above the largest number, nor NaN; 2^EXPONENT is the smallest normal number.
    Adding 1.5 · 2^(23 − MANTISSA_BITS) times its binade and taking it off again rounds; that
    product is exact, so that either way to compute it is the same.
    """
    bits = magnitude.to(tl.int32, bitcast=True)
    binade = tl.maximum(float_of_bits(bits & INFINITY_BITS), 2.0**EXPONENT)
    factor = tl.full(magnitude.shape, 1.5 * 2.0 ** (23 - MANTISSA_BITS), tl.float32)
    if FORMAT.is_interpreted:
        rounder = binade * factor
        return (magnitude + rounder) - rounder
    return tl.fma(binade, -factor, tl.fma(binade, factor, magnitude))


@triton.jit
def scale_on_grid(amax: tl.tensor, FORMAT: tl.constexpr, IS_TRIED: tl.constexpr) -> tl.tensor:
    """Return the scale of a largest magnitude on the grid; see `formats.scales`. `amax` is finite.

    IS_TRIED: whether only rows count that `is_usual`.
    """
    if FORMAT.grid == "e8m0":
        bits = amax.to(tl.int32, bitcast=True)
        if not FORMAT.is_floor:
            bits += 0x7FFFFF - (FORMAT.top_bits & 0x7FFFFF)  # carries where the mantissa is above the top level's
        return power_of_two((bits >> 23) - (FORMAT.top_bits >> 23))
    top_level = float_of_bits(tl.full(amax.shape, FORMAT.top_bits, tl.int32))
    if FORMAT.grid == "e4m3" or FORMAT.grid == "e4m1":
        # Where this is not IEEE's quotient, it is below the smallest scale, as that is.
        wanted = divide(amax, top_level, tl.full(amax.shape, FORMAT.reciprocal_of_top, tl.float32), FORMAT)
        if FORMAT.grid == "e4m3":
            return round_magnitude(tl.minimum(tl.maximum(wanted, E4M3_MIN), E4M3_MAX), 3, -6, FORMAT)
        return round_magnitude(tl.minimum(tl.maximum(wanted, E4M1_MIN), E4M1_MAX), 1, -8, FORMAT)
    reciprocal = tl.full(amax.shape, FORMAT.reciprocal_of_top, tl.float32)
    if IS_TRIED:
        return rounded_to_bfloat16(divide(amax, top_level, reciprocal, FORMAT))
    exponent = tl.minimum(tl.maximum(exponent_of(amax), -126), 126)  # `divide` is not exact with subnormals
    mantissa = amax * power_of_two(-exponent)
    wanted = divide(mantissa, top_level, reciprocal, FORMAT) * power_of_two(exponent)
    return to_bfloat16_grid(tl.minimum(tl.maximum(wanted, SMALLEST_NORMAL), BFLOAT16_MAX))


@triton.jit
def clipped_amax(amax: tl.tensor, ratio: tl.tensor) -> tl.tensor:
    """Multiply amax by a ratio, without overflow to infinity."""
    return tl.minimum(amax * ratio, FLOAT32_MAX)


@triton.jit
def group_scale(
    amax: tl.tensor, row_amax: tl.tensor, ratio: tl.tensor, FORMAT: tl.constexpr, IS_TRIED: tl.constexpr
) -> tl.tensor:
    """Compute the scale of each group (rows, groups), as `formats.group_scale` defines it.

    `row_amax` and `ratio`, clip ratio times candidate, are (rows,); only a format with a window
    reads `row_amax`. IS_TRIED: whether only rows count that `is_usual`; nothing but the grid can
    bind them, and a group of zeros may have any scale.
    """
    if IS_TRIED:
        return scale_on_grid(amax * ratio[:, None], FORMAT, True)
    scale = scale_on_grid(clipped_amax(amax, ratio[:, None]), FORMAT, False)
    is_bad = magnitude_bits(amax) >= INFINITY_BITS
    if FORMAT.octaves is not None:
        lowest = largest_scale(row_amax, ratio, FORMAT) * (2.0**-FORMAT.octaves)
        scale = tl.maximum(scale, lowest[:, None])
        is_bad |= (magnitude_bits(row_amax) > INFINITY_BITS)[:, None]
    scale = tl.where(is_bad, float("nan"), scale)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def is_usual(row_amax: tl.tensor, ratio: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Return the rows whose every scale is an FP8 number relative to 2^usual_exponent, and that no
    window binds: (rows,).

    In E8M0 a scale may still be too small for that. INT4: whether no scale nor its reciprocal is
    near float32's ends.
    """
    if FORMAT.is_integer:
        return (row_amax < USUAL_MAX) & (ratio >= 1)
    largest = largest_scale(row_amax, ratio, FORMAT)
    is_finite = magnitude_bits(row_amax) < INFINITY_BITS
    return is_finite & (largest <= 2.0 ** (FORMAT.usual_exponent + FORMAT.fp8_top_exponent))


@triton.jit
def largest_scale(row_amax: tl.tensor, ratio: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Return the scale of a row's largest magnitude under the largest candidate: (rows,)."""
    return scale_on_grid(clipped_amax(clipped_amax(row_amax, ratio), FORMAT.largest_candidate), FORMAT, False)
