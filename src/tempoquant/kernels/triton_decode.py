"""Device functions that read and write stored data, nibbles and scale bytes, without rounding.

Both are small floating-point numbers: placed at the exponent and mantissa bits of a float32, they
are the number times a power of two, subnormals included, so that one multiplication gives their
value.
"""

import triton
import triton.language as tl

E2M1_UNIT = tl.constexpr(2.0**126)  # of a nibble's low three bits at bit 22: float32's bias 127 less E2M1's 1
E4M3_UNIT = tl.constexpr(2.0**120)  # of a byte at bit 20: float32's bias 127 less E4M3's 7


@triton.jit
def level_of_nibble(nibble: tl.tensor, IS_INTEGER: tl.constexpr) -> tl.tensor:
    """Return the signed level, float32, of a nibble (int32, 0 … 15): two's complement, or E2M1's
    own bits.
    """
    if IS_INTEGER:
        return tl.maximum((nibble ^ 8) - 8, -7).to(tl.float32)
    magnitude = ((nibble & 7) << 22).to(tl.float32, bitcast=True) * E2M1_UNIT
    return tl.where(nibble > 8, -magnitude, magnitude)


@triton.jit
def load_scale(scale: tl.tensor, offsets: tl.tensor, mask: tl.tensor, GRID: tl.constexpr) -> tl.tensor:
    """Load stored scales as float32. `scale` points to int16 for the grid "bf16", else to bytes; 0
    where masked.
    """
    stored = tl.load(scale + offsets, mask=mask, other=0).to(tl.int32)
    if GRID == "bf16":
        return (stored << 16).to(tl.float32, bitcast=True)
    if GRID == "e8m0":
        bits = tl.where(stored == 0, 1 << 22, stored << 23)  # 2^-127 is subnormal
        return tl.where(mask, bits, 0).to(tl.float32, bitcast=True)
    return (stored << 20).to(tl.float32, bitcast=True) * E4M3_UNIT


@triton.jit
def packed_levels(levels: tl.tensor) -> tl.tensor:
    """Pack signed E2M1 levels (rows, columns) float32 to bytes (rows, columns / 2), the even column
    in the low nibble.
    """
    even, odd = tl.split(tl.reshape(levels, (levels.shape[0], levels.shape[1] // 2, 2)))
    return (_nibble_of_level(even) + _nibble_of_level(odd) * 16).to(tl.uint8)


@triton.jit
def _nibble_of_level(level: tl.tensor) -> tl.tensor:
    magnitude = (tl.abs(level) * (1 / E2M1_UNIT)).to(tl.int32, bitcast=True) >> 22
    return tl.where(level < 0, magnitude + 8, magnitude)


@triton.jit
def scale_byte(scale: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Convert scales on their grid to stored ones: float8e4nv, or the exponent's byte, where 255 is
    NaN.
    """
    if FORMAT.grid == "e8m0":
        return ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)
    else:
        byte = scale.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(scale == scale, byte, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
