"""One matrix product for packed four-bit operands with a scale for each group, as a checkpoint
stores them.

    y = Σ over groups (codes · codes) · scale[token, group] · weight_scale[output, group]
        · tensor_scale + hidden · upᵀ + bias

Blackwell's tensor cores multiply E2M1 numbers and their scales themselves (`tl.dot_scaled`), so
nothing is expanded.
"""

import triton
import triton.language as tl

from tempoquant.kernels.triton_decode import level_of_nibble, load_scale
from tempoquant.kernels.triton_tile import finish, place_of_tile, row_starts


@triton.jit
def scaled_gemm_kernel(  # noqa: PLR0913
    values: tl.tensor, scale: tl.tensor, weight: tl.tensor, weight_scale: tl.tensor, y: tl.tensor,
    column_scale: tl.tensor, hidden: tl.tensor, up: tl.tensor, bias: tl.tensor,
    num_tokens: int, num_outputs: int, rank: int,
    values_stride: int, scale_stride: int, weight_stride: int, weight_scale_stride: int, y_stride: int,
    hidden_stride: int, up_stride: int,
    NUM_INNER: tl.constexpr, GROUP: tl.constexpr, GRID: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, RANKS: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Compute a tile of y, TOKENS × OUTPUTS. Operands are bytes of two codes; scales are
    float8e4nv, or bytes of exponents.
    """
    first_token, first_output = place_of_tile(num_tokens, num_outputs, TOKENS, OUTPUTS, ROWS_AT_ONCE)
    values_rows = row_starts(values, first_token, num_tokens, values_stride, TOKENS)
    weight_rows = row_starts(weight, first_output, num_outputs, weight_stride, OUTPUTS)
    scale_rows = row_starts(scale, first_token, num_tokens, scale_stride, TOKENS)
    weight_scale_rows = row_starts(weight_scale, first_output, num_outputs, weight_scale_stride, OUTPUTS)
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for start in range(0, NUM_INNER, INNER):
        places = start // 2 + tl.arange(0, INNER // 2)[None, :]
        groups = start // GROUP + tl.arange(0, INNER // GROUP)[None, :]
        x = _loaded(values_rows, places, NUM_INNER // 2, INNER // 2)
        w = _loaded(weight_rows, places, NUM_INNER // 2, INNER // 2)
        if UPCAST:  # the interpreter has no such product; codes times scales are exact in float32, and so are products
            x = _numbers(x, scale_rows, groups, NUM_INNER, GROUP, GRID)
            w = _numbers(w, weight_scale_rows, groups, NUM_INNER, GROUP, GRID)
            total = tl.dot(x, w.T, total)
        else:
            x_scale = _loaded(scale_rows, groups, NUM_INNER // GROUP, INNER // GROUP)
            w_scale = _loaded(weight_scale_rows, groups, NUM_INNER // GROUP, INNER // GROUP)
            total = tl.dot_scaled(x, x_scale, "e2m1", w.T, w_scale, "e2m1", total)
    is_stored = first_token + tl.arange(0, TOKENS) < num_tokens
    finish(
        total, y, None, column_scale, hidden, up, bias, is_stored, first_token, first_output, num_tokens, num_outputs,
        rank, y_stride, 0, hidden_stride, up_stride, TOKENS, OUTPUTS, RANKS, RANK_BLOCKS, UPCAST,
    )  # fmt: skip


@triton.jit
def _loaded(rows: tl.tensor, places: tl.tensor, NUM: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Load the values at these places of each row, 0 behind its end."""
    if NUM % BLOCK == 0:
        return tl.load(rows + places)
    elif rows.dtype.element_ty == tl.uint8:
        return tl.load(rows + places, mask=places < NUM, other=0)
    else:
        return tl.load(rows + places, mask=places < NUM, other=0.0)


@triton.jit
def _numbers(
    packed: tl.tensor, scale_rows: tl.tensor, groups: tl.tensor, NUM_INNER: tl.constexpr, GROUP: tl.constexpr,
    GRID: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Decode packed codes to float32: (rows, 2 · bytes)."""
    codes = packed.to(tl.int32)
    levels = tl.join(level_of_nibble(codes & 0xF, False), level_of_nibble(codes >> 4, False))
    scale = load_scale(
        scale_rows.to(tl.pointer_type(tl.uint8), bitcast=True), groups, groups < NUM_INNER // GROUP, GRID
    )
    grouped = tl.reshape(levels, (packed.shape[0], groups.shape[1], GROUP)) * scale[:, :, None]
    return tl.reshape(grouped, (packed.shape[0], groups.shape[1] * GROUP))
