"""Division in a kernel with IEEE's single rounding, by multiplying with reciprocals: no branch, no
slow path.
"""

import triton
import triton.language as tl

from tempoquant.kernels.triton_bits import INFINITY_BITS, float_of_bits

ONE_BITS = tl.constexpr(0x3F800000)
TWO_THIRDS_BITS = tl.constexpr(0x3F2AAAAB)


@triton.jit
def divide(x: tl.tensor, divisor: tl.tensor, reciprocal: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Compute x / divisor rounded once, as IEEE does, from the rounded reciprocal: Markstein, IBM
    J. Res. Dev. 34 (1990).

    It takes three instructions without a branch instead of about fifteen with one. It is exact
    while neither the quotient nor the remainder, 2^24 times smaller than x, leaves the normal
    numbers; infinity becomes NaN.
    """
    quotient = x * reciprocal
    remainder = fused_multiply_add(-quotient, divisor, x, FORMAT)
    return fused_multiply_add(remainder, reciprocal, quotient, FORMAT)


@triton.jit
def divided(x: tl.tensor, high: tl.tensor, low: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Compute x over a divisor of eight significant bits, rounded once as IEEE does: two
    instructions.

    high + low is the divisor's reciprocal to 45 bits. A quotient by so short a divisor is never
    nearer to the midpoint of two floats than 2^-33 of itself: otherwise x, minus midpoint times
    divisor, would be less than one in its last place. It is never such a midpoint, which times the
    divisor would have more bits than x. So an error of 2^-44 before the rounding changes nothing,
    as long as `low` and x · low are not subnormal. Infinity becomes NaN.
    """
    return fused_multiply_add(x, high, x * low, FORMAT)


@triton.jit
def fused_multiply_add(x: tl.tensor, y: tl.tensor, z: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Compute x · y + z rounded once. Triton's interpreter rounds twice: there float64 holds the
    sum, exactly or nearly.
    """
    if FORMAT.is_interpreted:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def reciprocal_of_scale(scale: tl.tensor) -> tl.tensor:
    """Compute 1 / scale, rounded, of 2^e and 1.5 · 2^e, from 2^-126 to 2^127; anything for NaN."""
    bits = scale.to(tl.int32, bitcast=True)
    # −e, minus one if 1.5 makes the exponent's bits those of 2/3; 2^-127 is subnormal.
    of_mantissa = tl.where((bits & 0x400000) != 0, TWO_THIRDS_BITS - ONE_BITS, 0)
    return float_of_bits(tl.maximum(2 * ONE_BITS - (bits & INFINITY_BITS) + of_mantissa, 0x400000))


@triton.jit
def over_scale(x: tl.tensor, scale: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Compute x / scale as IEEE rounds it, of any scale: first its power of two, exactly, then its
    mantissa.

    Quotients that are subnormal, far below every level, may differ; infinity and NaN become NaN.
    """
    bits = scale.to(tl.int32, bitcast=True)
    power = float_of_bits(tl.maximum(2 * ONE_BITS - (bits & INFINITY_BITS), 0x400000))  # 2^-127 is subnormal
    mantissa = float_of_bits((bits & 0x7FFFFF) | ONE_BITS)
    reciprocal = tl.div_rn(tl.full(mantissa.shape, 1.0, tl.float32), mantissa)
    return divide(x * power, mantissa, reciprocal, FORMAT)


@triton.jit
def remainder_of_reciprocal(divisor: tl.tensor, reciprocal: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Compute the remainder of the reciprocal of a divisor of eight significant bits, to 44 bits of
    the whole, for `divided`.

    `reciprocal` may be off by a few units: 1 − divisor · reciprocal is exact all the same.
    """
    one = tl.full(divisor.shape, 1.0, tl.float32)
    return fused_multiply_add(-divisor, reciprocal, one, FORMAT) * reciprocal
