"""The kernel of `triton_quantize`, tile by tile: what is rounded, how, and where it is stored."""

import triton
import triton.language as tl

from tempoquant.kernels.triton_rounding import (
    INFINITY_BITS,
    float_of_bits,
    largest_scale,
    magnitude_bits,
    power_of_two,
    round_groups,
    round_to_eight_bits,
    row_base_exponent,
    to_bfloat16,
)


@triton.jit
def _input_tile(  # noqa: PLR0913
    x_rows: tl.tensor,
    hidden: tl.tensor,
    smoothing_factor: tl.tensor,
    deflation: tl.tensor,
    input_offset: tl.tensor,
    start: tl.tensor,
    row_mask: tl.tensor,
    rank: int,
    IN_FEATURES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """What is rounded: z of some rows and BLOCK_COLUMNS features from `start` on, (rows, BLOCK_COLUMNS) float32.

    `x_rows` points to the first number of each row; `hidden` is a block (rows, rank up to a power of two), or None.
    """
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < IN_FEATURES
    mask = row_mask[:, None] & inside[None, :]
    z = tl.load(x_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if smoothing_factor is not None:
        factor = tl.load(smoothing_factor + columns, mask=inside, other=1.0).to(tl.float32)
        z = tl.div_rn(z, tl.broadcast_to(factor[None, :], z.shape))
    if deflation is not None:
        ranks = tl.arange(0, hidden.shape[1])
        mask = inside[:, None] & (ranks < rank)[None, :]
        block = tl.load(deflation + columns[:, None] * rank + ranks[None, :], mask=mask, other=0.0)
        z -= tl.dot(hidden, tl.trans(block.to(hidden.dtype)), input_precision="ieee")
    if input_offset is not None:
        z -= tl.load(input_offset + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _rounded_tile(  # noqa: PLR0913
    grouped: tl.tensor,
    row_amax: tl.tensor,
    ratio: tl.tensor,
    is_eight: tl.tensor,
    base_exponent: tl.tensor,
    FORMAT: tl.constexpr,
    OUTPUT: tl.constexpr,
    ALL_EIGHT_BITS: tl.constexpr,
    HAS_EIGHT_BITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What is stored of (rows, groups, group), the scale of each group, and which rows do not fit FP8."""
    is_outside = is_eight & False
    if not ALL_EIGHT_BITS:
        scale, amax, tile = round_groups(grouped, row_amax, ratio, FORMAT)
        if OUTPUT == "fp8":
            relative = scale * power_of_two(-base_exponent)[:, None]
            if FORMAT.octaves is None:
                is_low = (amax > 0) & (relative < 2.0 ** (FORMAT.fp8_top_exponent - FORMAT.fp8_octaves))
                is_outside = tl.max(is_low.to(tl.int32), axis=1) > 0
            tile *= relative[:, :, None]
        if OUTPUT == "bf16":
            tile *= scale[:, :, None]
    if HAS_EIGHT_BITS:
        number, row_scale = round_to_eight_bits(grouped, row_amax, FORMAT)
        group_scale = tl.broadcast_to(row_scale[:, None], (grouped.shape[0], grouped.shape[1]))
        if OUTPUT == "bf16":
            number *= row_scale[:, None, None]
        if ALL_EIGHT_BITS:
            tile = number
            scale = group_scale
        else:
            tile = tl.where(is_eight[:, None, None], number, tile)
            scale = tl.where(is_eight[:, None], group_scale, scale)
            is_outside &= not is_eight
    if OUTPUT == "fp8":  # a row with NaN or infinity is told by its scale
        tile = tl.where((magnitude_bits(row_amax) < INFINITY_BITS)[:, None, None], tile, 0.0)
    return tile, scale, is_outside


@triton.jit
def _fp8_row_scale(
    row_amax: tl.tensor,
    base_exponent: tl.tensor,
    is_eight: tl.tensor,
    FORMAT: tl.constexpr,
    HAS_EIGHT_BITS: tl.constexpr,
) -> tl.tensor:
    """The power of two that FP8 values of a row are multiples of; 1 for zeros, NaN where the row is not finite."""
    scale = tl.where(row_amax == 0, 1.0, power_of_two(base_exponent))
    if HAS_EIGHT_BITS:
        _, eight_bit_scale = round_to_eight_bits(row_amax[:, None, None], row_amax, FORMAT)
        scale = tl.where(is_eight, eight_bit_scale, scale)
    return tl.where(magnitude_bits(row_amax) < INFINITY_BITS, scale, float("nan"))


@triton.jit(do_not_specialize=["num_tokens", "rows_per_clip_ratio", "rows_per_flag"])
def quantize_kernel(  # noqa: PLR0913
    x: tl.tensor,
    hidden: tl.tensor,
    smoothing_factor: tl.tensor,
    deflation: tl.tensor,
    input_offset: tl.tensor,
    clip_ratio: tl.tensor,
    eight_bits: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    outside: tl.tensor,
    num_tokens: int,
    rank: int,
    x_row_stride: int,
    hidden_row_stride: int,
    rows_per_clip_ratio: int,
    rows_per_flag: int,
    IN_FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    OUTPUT: tl.constexpr,
    ALL_EIGHT_BITS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """Rows `program_id · BLOCK_ROWS` and on. The parameters are those of `quantize_launch`."""
    GROUPS: tl.constexpr = BLOCK_COLUMNS // FORMAT.group
    HAS_EIGHT_BITS: tl.constexpr = ALL_EIGHT_BITS or eight_bits is not None
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_tokens
    x_rows = x + rows.to(tl.int64) * x_row_stride
    ratio = tl.load(clip_ratio + rows // rows_per_clip_ratio, mask=row_mask, other=1.0)
    is_eight = row_mask & ALL_EIGHT_BITS
    if eight_bits is not None:
        is_eight = tl.load(eight_bits + rows // rows_per_flag, mask=row_mask, other=0) != 0
    hidden_block = None
    if deflation is not None:
        ranks = tl.arange(0, BLOCK_RANK)
        offsets = rows.to(tl.int64)[:, None] * hidden_row_stride + ranks[None, :]
        hidden_block = tl.load(hidden + offsets, mask=row_mask[:, None] & (ranks < rank)[None, :], other=0.0)
        hidden_block = hidden_block.to(DOT_DTYPE)

    row_bits = tl.zeros((BLOCK_ROWS,), tl.int32)
    if OUTPUT == "fp8" or HAS_EIGHT_BITS or FORMAT.octaves is not None:
        for start in range(0, IN_FEATURES, BLOCK_COLUMNS):
            z = _input_tile(
                x_rows, hidden_block, smoothing_factor, deflation, input_offset, start, row_mask, rank,
                IN_FEATURES, BLOCK_COLUMNS,
            )  # fmt: skip
            row_bits = tl.maximum(row_bits, tl.max(magnitude_bits(z), axis=1))
    row_amax = float_of_bits(row_bits)
    base_exponent = row_base_exponent(largest_scale(row_amax, ratio, FORMAT), FORMAT.fp8_top_exponent)

    outside_rows = tl.zeros((BLOCK_ROWS,), tl.int1)
    for start in range(0, IN_FEATURES, BLOCK_COLUMNS):
        z = _input_tile(
            x_rows, hidden_block, smoothing_factor, deflation, input_offset, start, row_mask, rank,
            IN_FEATURES, BLOCK_COLUMNS,
        )  # fmt: skip
        grouped = tl.reshape(z, (BLOCK_ROWS, GROUPS, FORMAT.group))
        tile, tile_scale, is_outside = _rounded_tile(
            grouped, row_amax, ratio, is_eight, base_exponent, FORMAT, OUTPUT, ALL_EIGHT_BITS, HAS_EIGHT_BITS
        )
        outside_rows |= is_outside
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        mask = row_mask[:, None] & (columns < IN_FEATURES)[None, :]
        flat = tl.reshape(tile, (BLOCK_ROWS, BLOCK_COLUMNS))
        if OUTPUT == "bf16":
            flat = to_bfloat16(flat, not FORMAT.is_integer)
        flat = flat.to(values.dtype.element_ty)
        tl.store(values + rows.to(tl.int64)[:, None] * IN_FEATURES + columns[None, :], flat, mask=mask)
        if OUTPUT == "int8":
            num_groups: tl.constexpr = IN_FEATURES // FORMAT.group
            groups = start // FORMAT.group + tl.arange(0, GROUPS)
            mask = row_mask[:, None] & (groups < num_groups)[None, :]
            tl.store(scale + rows.to(tl.int64)[:, None] * num_groups + groups[None, :], tile_scale, mask=mask)

    if OUTPUT == "fp8":
        tl.store(scale + rows, _fp8_row_scale(row_amax, base_exponent, is_eight, FORMAT, HAS_EIGHT_BITS), mask=row_mask)
    if outside is not None:
        outside_rows &= row_mask & (row_bits < INFINITY_BITS)
        tl.store(outside + rows, outside_rows, mask=row_mask)
        if tl.max(outside_rows.to(tl.int32), axis=0) > 0:
            _clear_rows(values, rows, outside_rows, IN_FEATURES, BLOCK_COLUMNS)


@triton.jit
def _clear_rows(
    values: tl.tensor, rows: tl.tensor, mask: tl.tensor, IN_FEATURES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
) -> None:
    """Write zeros over the rows in `mask`."""
    tl.debug_barrier()  # other threads of this program may have written these rows
    for start in range(0, IN_FEATURES, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        offsets = rows.to(tl.int64)[:, None] * IN_FEATURES + columns[None, :]
        zeros = tl.zeros((mask.shape[0], BLOCK_COLUMNS), values.dtype.element_ty)
        tl.store(values + offsets, zeros, mask=mask[:, None] & (columns < IN_FEATURES)[None, :])
