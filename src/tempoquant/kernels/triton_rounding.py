"""Device functions that round as `formats/` defines it, to the bit: scales on their grid, numbers to levels.

Exponents come out of float32's own bits; magnitudes are compared and bounded as integers, in whose order NaN stands
above infinity and infinity above every number. A division is IEEE's, or multiplies by a reciprocal where that provably
gives the same level. Kernels that call these must be compiled with `enable_fp_fusion=False`: a fused multiply-add
rounds once where the definition rounds twice.
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
    largest_of,
    magnitude_bits,
    power_of_two,
    to_bfloat16_grid,
)
from tempoquant.kernels.triton_division import (
    divide,
    divided,
    reciprocal_of_scale,
    remainder_of_reciprocal,
)

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
BFLOAT16_MAX = tl.constexpr(3.3895313892515355e38)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
E4M3_MAX = tl.constexpr(scales.E4M3_MAX)
E4M3_MAX_BITS = tl.constexpr(0x43E00000)
INTEGER_MAX_BITS = tl.constexpr(0x42FE0000)  # 127
E4M3_MIN = tl.constexpr(scales.E4M3_MIN)
E4M1_MAX = tl.constexpr(scales.E4M1_MAX)
E4M1_MIN = tl.constexpr(scales.E4M1_MIN)


USUAL_EXPONENT = {ScaleGrid.E8M0: -5, ScaleGrid.E4M1: -1}
"""Of the power of two whose multiples FP8 rows are tried as. E4M1: relative to 1/2, FP8 holds every scale from its
least, 2^-8, to 16, and up to 16 the window of twelve octaves ends at or below 2^-8: so such a row has nothing to wait
for. E8M0: scales from 2^-13 to 2, what smoothing leaves."""


class Rounding(NamedTuple):
    """A format and a scale rule as kernels see them: numbers known when they are compiled.

    grid: the scale grid's name. is_integer: whether levels are integers. candidates: multiples of amax that are tried;
    is_floor: the rule "floor". octaves: the window of scales, or None. top_bits: the bits of the top level.
    even_rounder: what leaves a multiple of evenly spaced levels when it is added and subtracted.
    mantissa_bits, exponent: those of the levels' small floating-point system, and of its smallest normal number.
    are_even: whether levels are spaced evenly, below that number.
    fp8_top_exponent, fp8_octaves: see `fp8_window`. usual_exponent: of the base that FP8 rows are tried with first.
    is_interpreted: whether Triton's interpreter runs the kernel, which cannot do all that the compiler can.
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
    even_rounder: float
    reciprocal_of_top: float
    mantissa_bits: int
    exponent: int
    are_even: bool
    fp8_top_exponent: int
    fp8_octaves: int
    usual_exponent: int
    is_interpreted: bool


@functools.lru_cache
def rounding_of(format: Format, rule: ScaleRule) -> Rounding:
    """What kernels need to know of a format and a rule."""
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
        even_rounder=1.5 * 2.0**23 * step,
        reciprocal_of_top=float(torch.tensor(format.top_level).reciprocal()),
        mantissa_bits=int(math.log2(smallest_normal / step)),
        exponent=int(math.log2(smallest_normal)),
        are_even=format.top_level < smallest_normal,
        fp8_top_exponent=FP8_TOP_EXPONENT.get(format.scale_grid, 0),
        fp8_octaves=FP8_OCTAVES.get(format.scale_grid, 0),
        usual_exponent=USUAL_EXPONENT.get(format.scale_grid, 0),
        is_interpreted=triton.knobs.runtime.interpret,
    )


@triton.jit
def row_base_exponent(largest: tl.tensor, TOP_EXPONENT: tl.constexpr) -> tl.tensor:
    """The exponent of the power of two that puts a row's largest scale at 2^TOP_EXPONENT, itself a normal float32."""
    return tl.maximum(exponent_of(largest) - TOP_EXPONENT, -126)


@triton.jit
def round_magnitude(
    magnitude: tl.tensor, MANTISSA_BITS: tl.constexpr, EXPONENT: tl.constexpr, FORMAT: tl.constexpr
) -> tl.tensor:
    """The nearest number of a small floating-point system, ties to even, as `formats.nearest_level` finds it.

    A magnitude is not above the largest number, nor NaN; 2^EXPONENT is the smallest normal number. Adding 1.5 · 2^(23 −
    MANTISSA_BITS) times its binade and taking it off again rounds; that product is exact, so that either way to
    compute it is the same.
    """
    bits = magnitude.to(tl.int32, bitcast=True)
    binade = tl.maximum(float_of_bits(bits & INFINITY_BITS), 2.0**EXPONENT)
    factor = tl.full(magnitude.shape, 1.5 * 2.0 ** (23 - MANTISSA_BITS), tl.float32)
    if FORMAT.is_interpreted:
        rounder = binade * factor
        return (magnitude + rounder) - rounder
    return tl.fma(binade, -factor, tl.fma(binade, factor, magnitude))


@triton.jit
def scale_on_grid(amax: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """The scale that a largest magnitude asks for; see `formats.scales`. `amax` is finite."""
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
    exponent = tl.minimum(tl.maximum(exponent_of(amax), -126), 126)  # `divide` is not exact with subnormals
    mantissa = amax * power_of_two(-exponent)
    reciprocal = tl.full(amax.shape, FORMAT.reciprocal_of_top, tl.float32)
    wanted = divide(mantissa, top_level, reciprocal, FORMAT) * power_of_two(exponent)
    return to_bfloat16_grid(tl.minimum(tl.maximum(wanted, SMALLEST_NORMAL), BFLOAT16_MAX))


@triton.jit
def clipped_amax(amax: tl.tensor, ratio: tl.tensor) -> tl.tensor:
    """amax times a ratio, which may not make it infinite."""
    return tl.minimum(amax * ratio, FLOAT32_MAX)


@triton.jit
def group_scale(
    amax: tl.tensor, row_amax: tl.tensor, ratio: tl.tensor, FORMAT: tl.constexpr, IS_TRIED: tl.constexpr
) -> tl.tensor:
    """The scale of each group (rows, groups), as `formats.group_scale` defines it.

    `row_amax` and `ratio`, clip ratio times candidate, are (rows,); only a format with a window reads `row_amax`.
    IS_TRIED: whether only rows count that `is_usual`; nothing but the grid can bind them, and a group of zeros may have
    any scale.
    """
    if IS_TRIED:
        return scale_on_grid(amax * ratio[:, None], FORMAT)
    scale = scale_on_grid(clipped_amax(amax, ratio[:, None]), FORMAT)
    is_bad = magnitude_bits(amax) >= INFINITY_BITS
    if FORMAT.octaves is not None:
        lowest = largest_scale(row_amax, ratio, FORMAT) * (2.0**-FORMAT.octaves)
        scale = tl.maximum(scale, lowest[:, None])
        is_bad |= (magnitude_bits(row_amax) > INFINITY_BITS)[:, None]
    scale = tl.where(is_bad, float("nan"), scale)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def is_usual(row_amax: tl.tensor, ratio: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Of which rows every scale is an FP8 number relative to 2^usual_exponent, and no window binds: (rows,).

    In E8M0 a scale may still be too small for that.
    """
    largest = largest_scale(row_amax, ratio, FORMAT)
    is_finite = magnitude_bits(row_amax) < INFINITY_BITS
    return is_finite & (largest <= 2.0 ** (FORMAT.usual_exponent + FORMAT.fp8_top_exponent))


@triton.jit
def largest_scale(row_amax: tl.tensor, ratio: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """The scale that a row's largest magnitude may ask for, whatever candidate it takes: (rows,)."""
    return scale_on_grid(clipped_amax(clipped_amax(row_amax, ratio), FORMAT.largest_candidate), FORMAT)


@triton.jit
def levels_of(magnitude: tl.tensor, scale: tl.tensor, power: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """The level nearest to each magnitude over its scale: (rows, groups, group) with scales (rows, groups).

    A scale with at most one mantissa bit is divided by with its reciprocal: exactly for a power of two, and for 1.5 so
    that every tie between levels stays a tie, or goes to where ties go, and no other number crosses one (a test tries
    the neighbours of all ties). NaN becomes the top level, for its scale is NaN. `power` (rows, groups) is what INT4's
    magnitudes have been multiplied by.
    """
    if FORMAT.grid == "e8m0" or FORMAT.grid == "e4m1":
        scaled = magnitude * reciprocal_of_scale(scale)[:, :, None]
    else:
        if FORMAT.grid == "bf16":
            scale *= power
        high = 1.0 / scale
        low = remainder_of_reciprocal(scale, high, FORMAT)
        scaled = divided(magnitude, high[:, :, None], low[:, :, None], FORMAT)
    scaled = tl.minimum(scaled, FORMAT.top_level)
    if FORMAT.are_even:
        return (scaled + FORMAT.even_rounder) - FORMAT.even_rounder
    return round_magnitude(scaled, FORMAT.mantissa_bits, FORMAT.exponent, FORMAT)


@triton.jit
def sum_by_halves(x: tl.tensor, LOG2_GROUP: tl.constexpr) -> tl.tensor:
    """(rows, groups, group) to (rows, groups): first half plus second half, until one number is left.

    A sum over two numbers has no order, so the compiler cannot choose another.
    """
    ROWS: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1]
    for step in tl.static_range(LOG2_GROUP):
        x = tl.sum(tl.reshape(x, (ROWS, GROUPS, 2, 1 << (LOG2_GROUP - 1 - step))), axis=2)
    return tl.reshape(x, (ROWS, GROUPS))


@triton.jit
def squared_error(magnitude: tl.tensor, scale: tl.tensor, level: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """(rows, groups): the squared error of each group. A level times a scale is exact, so that one rounding is left."""
    if FORMAT.is_interpreted:
        error = level * scale[:, :, None] - magnitude
    else:
        error = tl.fma(level, tl.broadcast_to(-scale[:, :, None], level.shape), magnitude)
    return sum_by_halves(error * error, FORMAT.log2_group)


@triton.jit
def round_groups(
    grouped: tl.tensor, row_amax: tl.tensor, clip_ratio: tl.tensor, FORMAT: tl.constexpr, IS_TRIED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Scale and amax of each group (rows, groups), the magnitudes of its levels (rows, groups, group).

    The first candidate of the least error wins. `group_scale` says what IS_TRIED is.
    """
    magnitude = float_of_bits(magnitude_bits(grouped))
    amax = largest_of(grouped, FORMAT.is_interpreted)
    power = amax
    scaled = magnitude
    if FORMAT.grid == "bf16":  # so that no reciprocal is subnormal
        power = power_of_two(-exponent_of(amax))
        scaled = magnitude * power[:, :, None]
    scale = group_scale(amax, row_amax, clip_ratio * FORMAT.candidates[0], FORMAT, IS_TRIED)
    level = levels_of(scaled, scale, power, FORMAT)
    if len(FORMAT.candidates) > 1:
        error = squared_error(magnitude, scale, level, FORMAT)
        for index in tl.static_range(1, len(FORMAT.candidates)):
            other_scale = group_scale(amax, row_amax, clip_ratio * FORMAT.candidates[index], FORMAT, IS_TRIED)
            other_level = levels_of(scaled, other_scale, power, FORMAT)
            other_error = squared_error(magnitude, other_scale, other_level, FORMAT)
            is_better = other_error < error
            error = tl.where(is_better, other_error, error)
            scale = tl.where(is_better, other_scale, scale)
            level = tl.where(is_better[:, :, None], other_level, level)
    return scale, amax, level
