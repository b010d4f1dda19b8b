"""Rounding to eight bits in a kernel (W4A8), as `formats.eight_bits` defines it: E4M3 or, beside
INT4 weights, INT8.
"""

import triton
import triton.language as tl

from tempoquant.kernels.triton_bits import (
    INFINITY_BITS,
    exponent_of,
    float_of_bits,
    magnitude_bits,
    power_of_two,
    with_sign_of,
)
from tempoquant.kernels.triton_division import over_scale
from tempoquant.kernels.triton_rounding import INTEGER_ROUNDER
from tempoquant.kernels.triton_scales import E4M3_MAX, SMALLEST_NORMAL, round_magnitude

INTEGER_MAX = tl.constexpr(127.0)


@triton.jit
def eight_bit_scale(row_amax: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Compute the scale of each row (rows,) from its largest magnitude; NaN where that is not
    finite, 1 where it is 0.
    """
    if FORMAT.is_integer:
        scale = tl.maximum(tl.div_rn(row_amax, tl.full(row_amax.shape, INTEGER_MAX, tl.float32)), SMALLEST_NORMAL)
    else:
        scale = power_of_two(_e4m3_exponent(row_amax))
    scale = tl.where(magnitude_bits(row_amax) >= INFINITY_BITS, float("nan"), scale)
    return tl.where(row_amax == 0, 1.0, scale)


@triton.jit
def to_eight_bits(z: tl.tensor, row_amax: tl.tensor, OUTPUT: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """Round z (rows, columns) to eight bits: in units of its row's scale as int8 or FP8, or with it
    in float32 ("bf16").

    Numbers of a row that holds NaN or infinity are meaningless; as float32 they are NaN.
    """
    if FORMAT.is_integer:
        scale = eight_bit_scale(row_amax, FORMAT)[:, None]
        # The last byte of such a sum is the integer, of either sign; a scale of amax / 127 lets
        # none be above 127.
        rounded = over_scale(z, scale, FORMAT) + INTEGER_ROUNDER
        if OUTPUT == "int8":
            number = rounded.to(tl.int32, bitcast=True).to(tl.int8)
        else:
            number = (rounded - INTEGER_ROUNDER) * scale
    else:
        scaled = z * power_of_two(-tl.maximum(_e4m3_exponent(row_amax), -126))[:, None]
        if OUTPUT == "fp8" and not FORMAT.is_interpreted:
            number = scaled.to(tl.float8e4nv)
        else:
            magnitude = round_magnitude(tl.minimum(float_of_bits(magnitude_bits(scaled)), E4M3_MAX), 3, -6, FORMAT)
            number = with_sign_of(magnitude, scaled)
            if OUTPUT == "bf16":
                number *= eight_bit_scale(row_amax, FORMAT)[:, None]
    return number


@triton.jit
def _e4m3_exponent(row_amax: tl.tensor) -> tl.tensor:
    """Return the least exponent with row_amax ≤ 448 · 2^exponent: 448 is 1.75 · 2^8, so one more
    for a larger mantissa.
    """
    return exponent_of(float_of_bits(row_amax.to(tl.int32, bitcast=True) + 0x1FFFFF)) - 8
