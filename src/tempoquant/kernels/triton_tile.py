"""The common parts of the matrix products: the place of a program's tile of y, and the epilogue of
its sums.

y = sums · row_scale[token] · column_scale[output] + hidden · upᵀ + bias, rounded once
"""

import triton
import triton.language as tl

ROWS_AT_ONCE = 8
"""The rows of tiles that programs take before the next column, so that their operands stay in the
L2 cache.
"""


@triton.jit
def place_of_tile(
    num_tokens: int, num_outputs: int, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS_AT_ONCE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return first token and first output of this program's tile: down ROWS_AT_ONCE rows, then the
    next column.
    """
    program = tl.program_id(0)
    num_rows = tl.cdiv(num_tokens, TOKENS)
    num_columns = tl.cdiv(num_outputs, OUTPUTS)
    first_row = program // (ROWS_AT_ONCE * num_columns) * ROWS_AT_ONCE
    rows_here = min(num_rows - first_row, ROWS_AT_ONCE)
    place = program % (ROWS_AT_ONCE * num_columns)
    return (first_row + place % rows_here) * TOKENS, place // rows_here * OUTPUTS


@triton.jit
def row_starts(matrix: tl.tensor, first: tl.tensor, num_rows: int, stride: int, ROWS: tl.constexpr) -> tl.tensor:
    """Return pointers (ROWS, 1) to the starts of rows. Rows past the end repeat the last one; their
    results are not stored.

    The tile's place has 64 bits, offsets within it 32: half the registers of 64 everywhere.
    """
    base = min(first, num_rows - 1)
    within = tl.minimum(tl.arange(0, ROWS), num_rows - 1 - base)
    return matrix + base.to(tl.int64) * stride + within[:, None] * stride


@triton.jit
def add_branch(
    total: tl.tensor, hidden_rows: tl.tensor, up_rows: tl.tensor, rank: int,
    RANKS: tl.constexpr, RANK_BLOCKS: tl.constexpr, UPCAST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Add hidden · upᵀ in float32, RANKS of the rank at a time, the last of them padded with
    zeros.
    """
    for block in tl.range(0, RANK_BLOCKS, num_stages=1):
        ranks = block * RANKS + tl.arange(0, RANKS)[None, :]
        h = tl.load(hidden_rows + ranks, mask=ranks < rank, other=0.0)
        u = tl.load(up_rows + ranks, mask=ranks < rank, other=0.0)
        if UPCAST:  # the interpreter cannot multiply bfloat16
            h, u = h.to(tl.float32), u.to(tl.float32)
        total = tl.dot(h, u.T, total)
    return total


@triton.jit
def finish(  # noqa: PLR0913
    total: tl.tensor, y: tl.tensor, row_scale: tl.tensor, column_scale: tl.tensor, hidden: tl.tensor, up: tl.tensor,
    bias: tl.tensor, stored: tl.tensor,
    first_token: tl.tensor, first_output: tl.tensor, num_tokens: int, num_outputs: int, rank: int,
    y_stride: int, column_scale_stride: int, hidden_stride: int, up_stride: int,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, RANKS: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Scale, add branch and bias, round, store. Terms that a layer does not have are None.

    total: (TOKENS, OUTPUTS) float32. stored: (TOKENS,) which rows to store.
    """
    tokens = first_token + tl.arange(0, TOKENS)
    outputs = first_output + tl.arange(0, OUTPUTS)
    has_output = outputs < num_outputs
    if row_scale is not None:
        total *= tl.load(row_scale + tokens, mask=tokens < num_tokens, other=0.0)[:, None]
    if column_scale is not None:
        total *= tl.load(column_scale + outputs * column_scale_stride, mask=has_output, other=0.0)[None, :]
    if hidden is not None:
        hidden_rows = row_starts(hidden, first_token, num_tokens, hidden_stride, TOKENS)
        up_rows = row_starts(up, first_output, num_outputs, up_stride, OUTPUTS)
        total = add_branch(total, hidden_rows, up_rows, rank, RANKS, RANK_BLOCKS, UPCAST)
    if bias is not None:
        total += tl.load(bias + outputs, mask=has_output, other=0.0).to(tl.float32)[None, :]
    tile = y + first_token.to(tl.int64) * y_stride + first_output
    places = tile + tl.arange(0, TOKENS)[:, None] * y_stride + tl.arange(0, OUTPUTS)[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=stored[:, None] & has_output[None, :])


def rank_blocks(rank: int) -> dict[str, int]:
    """Return RANKS and RANK_BLOCKS: a tensor core takes at least 16 at a time, and few constants
    mean few compilations.
    """
    block = min(64, max(16, triton.next_power_of_2(rank)))
    return {"RANKS": block, "RANK_BLOCKS": triton.cdiv(rank, block)}
