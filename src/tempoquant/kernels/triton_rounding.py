"""Device functions that round groups of numbers to four bits as `formats/` defines it, to the bit.

A division is IEEE's, or multiplies by a reciprocal if that provably gives the same level. Kernels
that call these must be compiled with `enable_fp_fusion=False`: a fused multiply-add rounds once
where the definition rounds twice.
"""

import triton
import triton.language as tl

from tempoquant.kernels.triton_bits import exponent_of, float_of_bits, largest_of, magnitude_bits, power_of_two
from tempoquant.kernels.triton_division import divided, reciprocal_of_scale, remainder_of_reciprocal
from tempoquant.kernels.triton_scales import USUAL_MIN, group_scale, round_magnitude

INTEGER_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # the last bit of float32 is worth one beside it, whatever the sign


@triton.jit
def levels_of(magnitude: tl.tensor, scale: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Return the E2M1 level nearest to each magnitude over its scale: (rows, groups, group) with
    scales (rows, groups).

    A scale with at most one mantissa bit is divided by with its reciprocal: exactly for a power of
    two, and for 1.5 so that every tie between levels stays a tie, or goes to where ties go, and no
    other number crosses one (a test tries the neighbours of all ties). NaN becomes the top level,
    for its scale is NaN.
    """
    if FORMAT.grid == "e8m0" or FORMAT.grid == "e4m1":
        scaled = magnitude * reciprocal_of_scale(scale)[:, :, None]
    else:
        high = 1.0 / scale
        low = remainder_of_reciprocal(scale, high, FORMAT)
        scaled = divided(magnitude, high[:, :, None], low[:, :, None], FORMAT)
    scaled = tl.minimum(scaled, FORMAT.top_level)
    return round_magnitude(scaled, FORMAT.mantissa_bits, FORMAT.exponent, FORMAT)


@triton.jit
def sum_by_halves(x: tl.tensor, LOG2_GROUP: tl.constexpr) -> tl.tensor:
    """Sum the first half plus the second half, until one number is left: (rows, groups, group) to
    (rows, groups).

    A sum over two numbers has no order, so the compiler cannot choose another.
    """
    ROWS: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1]
    for step in tl.static_range(LOG2_GROUP):
        x = tl.sum(tl.reshape(x, (ROWS, GROUPS, 2, 1 << (LOG2_GROUP - 1 - step))), axis=2)
    return tl.reshape(x, (ROWS, GROUPS))


@triton.jit
def squared_error(magnitude: tl.tensor, scale: tl.tensor, level: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Compute the squared error of each group, (rows, groups). A level times a scale is exact, so
    that one rounding is left.
    """
    if FORMAT.is_interpreted:
        error = level * scale[:, :, None] - magnitude
    else:
        error = tl.fma(level, tl.broadcast_to(-scale[:, :, None], level.shape), magnitude)
    return sum_by_halves(error * error, FORMAT.log2_group)


@triton.jit
def round_groups(
    grouped: tl.tensor, row_amax: tl.tensor, clip_ratio: tl.tensor, FORMAT: tl.constexpr, IS_TRIED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return scale and amax of each group (rows, groups), and the magnitudes of its levels (rows,
    groups, group).

    The first candidate of the least error wins. `group_scale` defines IS_TRIED. Integer levels may
    still need rounding.
    """
    amax = largest_of(grouped, FORMAT.is_interpreted)
    if FORMAT.is_integer:
        scale, level = _round_to_integers(grouped, amax, clip_ratio, FORMAT, IS_TRIED)
    else:
        scale, level = _round_to_floats(grouped, amax, row_amax, clip_ratio, FORMAT, IS_TRIED)
    return scale, amax, level


@triton.jit
def _round_to_floats(
    grouped: tl.tensor, amax: tl.tensor, row_amax: tl.tensor, clip_ratio: tl.tensor, FORMAT: tl.constexpr,
    IS_TRIED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Scale and levels of each group of E2M1 numbers."""
    magnitude = float_of_bits(magnitude_bits(grouped))
    scale = group_scale(amax, row_amax, clip_ratio * FORMAT.candidates[0], FORMAT, IS_TRIED)
    level = levels_of(magnitude, scale, FORMAT)
    if len(FORMAT.candidates) > 1:
        error = squared_error(magnitude, scale, level, FORMAT)
        for index in tl.static_range(1, len(FORMAT.candidates)):
            other_scale = group_scale(amax, row_amax, clip_ratio * FORMAT.candidates[index], FORMAT, IS_TRIED)
            other_level = levels_of(magnitude, other_scale, FORMAT)
            other_error = squared_error(magnitude, other_scale, other_level, FORMAT)
            is_better = other_error < error
            error = tl.where(is_better, other_error, error)
            scale = tl.where(is_better, other_scale, scale)
            level = tl.where(is_better[:, :, None], other_level, level)
    return scale, level


@triton.jit
def _round_to_integers(
    grouped: tl.tensor, amax: tl.tensor, clip_ratio: tl.tensor, FORMAT: tl.constexpr, IS_TRIED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scale of each group, and its numbers over it, at most the top level: (rows, groups, group).

    Of a candidate only the error is computed, with the integer nearest to x · (1 / scale). That is
    the one nearest to their quotient but where the quotient is the middle of two, and from there
    both are as far. (A scale s has eight significant bits and a middle t four; the floats beside s
    · t differ from it by more than 2^-24 of it, which is more than a rounded reciprocal does. A
    test tries them all.) Only by the best scale numbers are divided.
    """
    power = amax
    unit = grouped
    bounded = amax
    if IS_TRIED:  # a group of zeros has some scale too
        bounded = tl.maximum(amax, USUAL_MIN)
    else:  # so that no reciprocal is subnormal
        power = power_of_two(-exponent_of(amax))
        unit = grouped * power[:, :, None]
    scale = group_scale(bounded, amax, clip_ratio * FORMAT.candidates[0], FORMAT, IS_TRIED)
    high, low = reciprocal_of_bfloat16(scale, power, FORMAT, IS_TRIED)
    if len(FORMAT.candidates) > 1:
        level = nearest_integer(unit, high, FORMAT)
        error = _error_of_integers(grouped, scale, level, FORMAT, FORMAT.do_clip[0] or not IS_TRIED)
        for index in tl.static_range(1, len(FORMAT.candidates)):
            other_scale = group_scale(bounded, amax, clip_ratio * FORMAT.candidates[index], FORMAT, IS_TRIED)
            other_high, other_low = reciprocal_of_bfloat16(other_scale, power, FORMAT, IS_TRIED)
            level = nearest_integer(unit, other_high, FORMAT)
            other_error = _error_of_integers(grouped, other_scale, level, FORMAT, FORMAT.do_clip[index] or not IS_TRIED)
            is_better = other_error < error
            error = tl.where(is_better, other_error, error)
            scale = tl.where(is_better, other_scale, scale)
            high = tl.where(is_better, other_high, high)
            low = tl.where(is_better, other_low, low)
    scaled = tl.abs(divided(unit, high[:, :, None], low[:, :, None], FORMAT))
    if IS_TRIED:
        scale = tl.where(amax == 0, 1.0, scale)
    return scale, tl.minimum(scaled, FORMAT.top_level)


@triton.jit
def reciprocal_of_bfloat16(
    scale: tl.tensor, power: tl.tensor, FORMAT: tl.constexpr, IS_TRIED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return 1 / scale to 2^-24 of itself, and its remainder, for `divided`; of scale · power
    unless IS_TRIED.
    """
    if not IS_TRIED:
        scale *= power
    guess = 1.0 / scale
    high = guess + remainder_of_reciprocal(scale, guess, FORMAT)
    return high, remainder_of_reciprocal(scale, high, FORMAT)


@triton.jit
def nearest_integer(x: tl.tensor, reciprocal: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Return the integer nearest to x · reciprocal, which is not rounded before."""
    factor = tl.broadcast_to(reciprocal[:, :, None], x.shape)
    if FORMAT.is_interpreted:  # float64 has room for the product, and rounds it where its last bit is worth one
        product = x.to(tl.float64) * factor.to(tl.float64)
        return ((product + 1.5 * 2.0**52) - 1.5 * 2.0**52).to(tl.float32)
    rounder = tl.full(x.shape, INTEGER_ROUNDER, tl.float32)
    return tl.fma(x, factor, rounder) - INTEGER_ROUNDER


@triton.jit
def _error_of_integers(
    x: tl.tensor, scale: tl.tensor, level: tl.tensor, FORMAT: tl.constexpr, DOES_CLIP: tl.constexpr
) -> tl.tensor:
    """Return the squared error of each group, (rows, groups); DOES_CLIP: whether a level may be
    above the top one.
    """
    if DOES_CLIP:
        x = tl.abs(x)
        level = tl.minimum(tl.abs(level), FORMAT.top_level)
    return squared_error(x, scale, level, FORMAT)
