"""The block rotation in a kernel: sums and differences in the order of `formats.rotate`, so equal
to the last bit.
"""

import triton
import triton.language as tl

from tempoquant.formats import ROTATION_SIZE

SIZE = tl.constexpr(ROTATION_SIZE)
ROOT = tl.constexpr(ROTATION_SIZE**-0.5)


@triton.jit
def rotated_tile(z: tl.tensor, IS_SCALED: tl.constexpr) -> tl.tensor:
    """Rotate each block of SIZE columns of a tile (rows, columns) float32.

    IS_SCALED: whether z has been multiplied by ROOT before, a power of two, which gives the same at
    no cost.

    It must be compiled with `enable_fp_fusion=False`, like everything that rounds as the definition
    does.
    """
    ROWS: tl.constexpr = z.shape[0]
    COLUMNS: tl.constexpr = z.shape[1]
    for step in tl.static_range(4):  # halves of 8, 4, 2 and 1
        z = _sums_and_differences(z, ROWS, COLUMNS, SIZE >> (step + 1))
    if not IS_SCALED:
        z *= ROOT
    return z


@triton.jit
def _sums_and_differences(z: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr) -> tl.tensor:
    pairs = tl.permute(tl.reshape(z, (ROWS, COLUMNS // (2 * HALF), 2, HALF)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
    return tl.reshape(pairs, (ROWS, COLUMNS))
