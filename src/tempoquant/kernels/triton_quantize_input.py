"""The input of the rounding kernels, tile by tile: z = H(x / smoothing_factor) − hidden ·
deflationᵀ − input_offset.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from tempoquant.kernels.triton_division import divided, remainder_of_reciprocal
from tempoquant.kernels.triton_rotation import rotated_tile

NARROW = tl.constexpr(64)
"""Columns of a tile of which a thread has a quarter, in two rows; of a wider tile it has one group
of one row.
"""


class InputSteps(NamedTuple):
    """The steps of an input's transform in kernels: numbers known at compile time."""

    factor: bool
    rotation: bool
    offset: bool
    deflation: bool


@triton.jit(do_not_specialize=["num_features"])
def columns_kernel(
    smoothing_factor: tl.tensor, input_offset: tl.tensor, columns: tl.tensor, num_features: int,
    FORMAT: tl.constexpr, HAS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Fill columns (3, in) float32: 1 / smoothing_factor as the sum of two floats (`divided`), and
    the offset.

    With a rotation the reciprocals also hold its 1/4, and the sixteen of a block are in the order
    of their indices' reversed bits: `rotated_tile` leaves a thread's registers in this order, so
    whole vectors can be loaded.
    """
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_features
    if smoothing_factor is not None:
        features = places
        if HAS.rotation:
            within = places % 16
            reversed = (within & 1) * 8 + (within & 2) * 2 + (within & 4) // 2 + within // 8
            features = places - within + reversed
        factor = tl.load(smoothing_factor + features, mask=mask, other=1.0).to(tl.float32)
        high = tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor)
        low = remainder_of_reciprocal(factor, high, FORMAT)
        unit = 0.25 if HAS.rotation else 1.0
        tl.store(columns + places, high * unit, mask=mask)
        tl.store(columns + num_features + places, low * unit, mask=mask)
    if input_offset is not None:
        offset = tl.load(input_offset + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(columns + 2 * num_features + places, offset, mask=mask)


@triton.jit
def input_tile(
    source: tl.tuple, start: tl.tensor, rank: int, IN_FEATURES: tl.constexpr, FORMAT: tl.constexpr,
    HAS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return z of some rows and BLOCK_COLUMNS features from `start` on, in float32; beyond the last
    feature anything.

    source: the result of `source_of`. HAS: an `InputSteps`.
    """
    x_rows, hidden, more_hidden, columns, deflation = source
    features = start + tl.arange(0, BLOCK_COLUMNS)
    z = _to_float32(_loaded(x_rows + features[None, :], features[None, :], IN_FEATURES, BLOCK_COLUMNS), FORMAT)
    if HAS.factor:
        high = _loaded(columns + features, features, IN_FEATURES, BLOCK_COLUMNS)
        low = _loaded(columns + IN_FEATURES + features, features, IN_FEATURES, BLOCK_COLUMNS)
        if HAS.rotation:
            high, low = _in_order(high), _in_order(low)
        z = _smoothed(z, high[None, :], low[None, :], FORMAT)
    if HAS.rotation:
        z = rotated_tile(z, HAS.factor)
    if HAS.deflation:
        z = _deflated(z, hidden, more_hidden, deflation, start, rank, IN_FEATURES, BLOCK_COLUMNS)
    if HAS.offset:
        z -= _loaded(columns + 2 * IN_FEATURES + features, features, IN_FEATURES, BLOCK_COLUMNS)[None, :]
    return z


@triton.jit
def _to_float32(x: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Convert x to float32: two bfloat16 of a register take one instruction each, where the
    compiler takes three.
    """
    if FORMAT.is_interpreted or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }", "=r,h", [x], dtype=tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _smoothed(x: tl.tensor, high: tl.tensor, low: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Compute `divided` in assembly: the compiler would pack two for Blackwell, which costs more
    moves than it saves.
    """
    if FORMAT.is_interpreted:
        return divided(x, high, low, FORMAT)
    return tl.inline_asm_elementwise(
        "{ .reg .f32 rest; mul.rn.f32 rest, $1, $3; fma.rn.f32 $0, $1, $2, rest; }", "=f,f,f,f", [x, high, low],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _in_order(reversed: tl.tensor) -> tl.tensor:
    """Reorder a vector whose blocks of sixteen are in the order of reversed bits: (features,)."""
    bits = tl.reshape(reversed, (reversed.shape[0] // 16, 2, 2, 2, 2))
    return tl.reshape(tl.permute(bits, (0, 4, 3, 2, 1)), (reversed.shape[0],))


@triton.jit
def source_of(  # noqa: PLR0913
    x: tl.tensor, hidden: tl.tensor, columns: tl.tensor, deflation: tl.tensor,
    first_row: tl.tensor, num_tokens: int, rank: int, x_row_stride: int, hidden_row_stride: int,
    FORMAT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT_RANK: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return the sources of `input_tile`: pointers to the rows of x, both blocks of −hidden, the
    rest unchanged.

    A row behind the last token repeats the last one, and its results are not stored. A missing
    tensor is replaced by x, which is not read: the compiler puts no None into a tuple.
    """
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_ROWS), num_tokens - 1)
    x_rows = x + rows.to(tl.int64)[:, None] * x_row_stride
    block, more, directions, of_features = x, x, x, x
    if columns is not None:
        of_features = columns
    if deflation is not None:
        directions = deflation
        block = _hidden_block(
            hidden, first_row, 0, num_tokens, rank, hidden_row_stride, FORMAT, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT_RANK
        )
        more = _hidden_block(
            hidden, first_row, 1, num_tokens, rank, hidden_row_stride, FORMAT, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT_RANK
        )
    return x_rows, block, more, of_features, directions


@triton.jit
def _loaded(
    pointers: tl.tensor, columns: tl.tensor, IN_FEATURES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
) -> tl.tensor:
    """Load the values there, 0 beyond the last feature; if tiles end with the features, nothing is
    masked.
    """
    if IN_FEATURES % BLOCK_COLUMNS == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns < IN_FEATURES, other=0.0)


@triton.jit
def _deflation_block(
    deflation: tl.tensor, features: tl.tensor, first: tl.constexpr, rank: int, IN_FEATURES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, NUM_RANKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load NUM_RANKS columns of deflation from `first` on, of these features: (features,
    NUM_RANKS).
    """
    ranks = first + tl.arange(0, NUM_RANKS)
    places = deflation + features[:, None] * rank + ranks[None, :]
    mask = (ranks < rank)[None, :]
    if IN_FEATURES % BLOCK_COLUMNS != 0:
        mask = mask & (features < IN_FEATURES)[:, None]
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def _hidden_block(  # noqa: PLR0913
    hidden: tl.tensor, first_row: tl.tensor, which: tl.constexpr, num_tokens: int, rank: int, row_stride: int,
    FORMAT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NUM_RANKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load −hidden for the first or the second product of `_deflated`: (rows of a product,
    NUM_RANKS).
    """
    if BLOCK_COLUMNS == NARROW:
        m = tl.arange(0, BLOCK_ROWS)
        rows = first_row + m % 16 // 8 * (BLOCK_ROWS // 2) + m // 16 * 8 + m % 8
        ranks = which * NUM_RANKS + tl.arange(0, NUM_RANKS)
        is_there = rows < num_tokens
    else:
        m = tl.arange(0, 2 * BLOCK_ROWS)
        rows = first_row + m // 16 * 8 + m % 8
        ranks = tl.arange(0, NUM_RANKS)
        is_there = (rows < num_tokens) & (m % 16 // 8 == which)
    mask = is_there[:, None] & (ranks < rank)[None, :]
    block = tl.load(hidden + rows.to(tl.int64)[:, None] * row_stride + ranks[None, :], mask=mask, other=0.0)
    if FORMAT.is_interpreted:  # which cannot multiply bfloat16; in float32 the products are the same
        block = block.to(tl.float32)
    return -block


@triton.jit
def _deflated(
    z: tl.tensor, hidden: tl.tensor, more_hidden: tl.tensor, deflation: tl.tensor, start: tl.tensor, rank: int,
    IN_FEATURES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Compute z − hidden · deflationᵀ, (rows, BLOCK_COLUMNS) float32, by two products that add to
    z.

    Tensor cores add to z in its registers: no subtraction is left. A tensor core leaves, of sixteen
    rows and eight columns, two rows (m and m + 8) and two columns each with four neighbouring
    threads. Rows and columns are given to it in such an order that each thread ends up with whole
    groups, whose largest number and sum of errors no other thread has a part in, and with as many
    numbers side by side as are loaded and stored at once. That holds while no two warps share rows;
    the compiler sees to it for a sum of two products. Any other order of the hardware's would cost
    time and change nothing.

    Tiles of NARROW columns, for groups of 16 and for eight bits: each of the four threads has a
    quarter of the columns, of two rows. The two products are of half of the rank each. Threads
    would share wider groups so. Tiles of four of these are wide: there both of a thread's rows m
    are halves of one group of one row. The first product is of the first halves of groups, where
    −hidden is zero for the m of second halves, and the second product is of these. Tensor cores do
    twice the work, of which they have little.
    """
    ROWS: tl.constexpr = z.shape[0]
    QUARTER: tl.constexpr = BLOCK_COLUMNS // 4
    NUM_RANKS: tl.constexpr = hidden.shape[1]
    if BLOCK_COLUMNS == NARROW:
        n = tl.arange(0, BLOCK_COLUMNS)
        features = start + (n % 8 // 2) * QUARTER + n // 8 * 2 + n % 2
        block = _deflation_block(deflation, features, 0, rank, IN_FEATURES, BLOCK_COLUMNS, NUM_RANKS)
        more = _deflation_block(deflation, features, NUM_RANKS, rank, IN_FEATURES, BLOCK_COLUMNS, NUM_RANKS)
        total = tl.permute(tl.reshape(z, (2, ROWS // 16, 8, 4, BLOCK_COLUMNS // 8, 2)), (1, 0, 2, 4, 3, 5))
        total = tl.reshape(total, (ROWS, BLOCK_COLUMNS))
    else:
        n = tl.arange(0, BLOCK_COLUMNS // 2)
        features = start + (n % 8 // 2) * QUARTER + n // 8 * 2 + n % 2
        block = _deflation_block(deflation, features, 0, rank, IN_FEATURES, BLOCK_COLUMNS, NUM_RANKS)
        more = _deflation_block(deflation, features + QUARTER // 2, 0, rank, IN_FEATURES, BLOCK_COLUMNS, NUM_RANKS)
        total = tl.permute(tl.reshape(z, (ROWS // 8, 8, 4, 2, BLOCK_COLUMNS // 16, 2)), (0, 3, 1, 4, 2, 5))
        total = tl.reshape(total, (2 * ROWS, BLOCK_COLUMNS // 2))
    total = tl.dot(hidden, tl.trans(block.to(hidden.dtype)), total, input_precision="ieee")
    total = tl.dot(more_hidden, tl.trans(more.to(hidden.dtype)), total, input_precision="ieee")
    if BLOCK_COLUMNS == NARROW:
        total = tl.reshape(total, (ROWS // 16, 2, 8, BLOCK_COLUMNS // 8, 4, 2))
        total = tl.permute(total, (1, 0, 2, 4, 3, 5))
    else:
        total = tl.reshape(total, (ROWS // 8, 2, 8, BLOCK_COLUMNS // 16, 4, 2))
        total = tl.permute(total, (0, 2, 4, 1, 3, 5))
    return tl.reshape(total, (ROWS, BLOCK_COLUMNS))
