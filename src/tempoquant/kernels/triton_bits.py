"""Device functions on the bits of float32, which logarithms would round, and comparisons would
hide.

Magnitudes as integers are in an order in which NaN stands above infinity and infinity above every
number.
"""

import triton
import triton.language as tl

SIGN = tl.constexpr(-(2**31))
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_bits(x: tl.tensor) -> tl.tensor:
    """Return the bits of |x|, an int32 that grows with it."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def float_of_bits(bits: tl.tensor) -> tl.tensor:
    """Return the float32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent: tl.tensor) -> tl.tensor:
    """Return 2^exponent as float32, for exponents −126 … 127; others are clamped."""
    return float_of_bits((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23)


@triton.jit
def exponent_of(x: tl.tensor) -> tl.tensor:
    """Return ⌊log₂ x⌋ of a positive normal float32; −127 for zero and subnormals."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def to_bfloat16_grid(x: tl.tensor) -> tl.tensor:
    """Return the nearest bfloat16 as float32, ties to even; NaN stays NaN."""
    return tl.where(magnitude_bits(x) > INFINITY_BITS, x, rounded_to_bfloat16(x))


@triton.jit
def rounded_to_bfloat16(x: tl.tensor) -> tl.tensor:
    """Return the nearest bfloat16 as float32, ties to even, of a number that is not NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return float_of_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)


@triton.jit
def to_bfloat16(x: tl.tensor, IS_EXACT: tl.constexpr) -> tl.tensor:
    """Return the nearest bfloat16, subnormals included: the upper half of the float32's bits, which
    hold it if IS_EXACT.
    """
    if not IS_EXACT:
        x = to_bfloat16_grid(x)
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def with_sign_of(magnitude: tl.tensor, x: tl.tensor) -> tl.tensor:
    """Return the magnitude with the sign of x."""
    return float_of_bits(magnitude.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & SIGN))


@triton.jit
def largest_of(x: tl.tensor, IS_INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return the largest magnitude along the last dimension, NaN if there is one: one instruction a
    number.
    """
    AXIS: tl.constexpr = len(x.shape) - 1
    if IS_INTERPRETED:  # our function takes long there; bits have the same order
        return float_of_bits(tl.max(magnitude_bits(x), axis=AXIS))
    return tl.reduce(tl.abs(x), AXIS, _larger)


@triton.jit
def larger_of(x: tl.tensor, y: tl.tensor, IS_INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return the larger of two magnitudes, NaN if one is."""
    if IS_INTERPRETED:
        return float_of_bits(tl.maximum(magnitude_bits(x), magnitude_bits(y)))
    return _larger(x, y)


@triton.jit
def _larger(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
