"""The kernel of `triton_quantize`, tile by tile: what is rounded, how, and where it is stored."""

import triton
import triton.language as tl

from tempoquant.kernels.triton_bits import (
    INFINITY_BITS,
    float_of_bits,
    magnitude_bits,
    power_of_two,
    to_bfloat16,
    with_sign_of,
)
from tempoquant.kernels.triton_rotation import rotated_tile
from tempoquant.kernels.triton_rounding import (
    divide,
    largest_scale,
    round_groups,
    round_to_eight_bits,
    row_base_exponent,
)


@triton.jit
def input_tile(  # noqa: PLR0913
    x_rows: tl.tensor,
    hidden: tl.tensor,
    more_hidden: tl.tensor,
    smoothing_factor: tl.tensor,
    reciprocal_factor: tl.tensor,
    deflation: tl.tensor,
    input_offset: tl.tensor,
    start: tl.tensor,
    row_mask: tl.tensor,
    rank: int,
    IN_FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """What is rounded: z of some rows and BLOCK_COLUMNS features from `start` on, in float32.

    `x_rows` points to the first number of each row; `hidden` and `more_hidden` are blocks of either half of the rank,
    or None.
    """
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < IN_FEATURES
    mask = row_mask[:, None] & inside[None, :]
    z = tl.load(x_rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if smoothing_factor is not None:
        factor = tl.load(smoothing_factor + columns, mask=inside, other=1.0).to(tl.float32)
        reciprocal = tl.load(reciprocal_factor + columns, mask=inside, other=1.0)
        z = divide(z, factor[None, :], reciprocal[None, :], FORMAT)
    if ROTATED:
        z = rotated_tile(z)
    if deflation is not None:
        z -= _deflated(hidden, more_hidden, deflation, start, rank, IN_FEATURES, BLOCK_COLUMNS)
    if input_offset is not None:
        z -= tl.load(input_offset + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _hidden_order(ROWS: tl.constexpr) -> tl.tensor:
    """Which row of a tile is the m-th that a tensor core is given: (ROWS,). See `_deflated`."""
    m = tl.arange(0, ROWS)
    return m % 16 // 8 * (ROWS // 2) + m // 16 * 8 + m % 8


@triton.jit
def _deflation_block(
    deflation: tl.tensor,
    features: tl.tensor,
    first: tl.constexpr,
    rank: int,
    IN_FEATURES: tl.constexpr,
    NUM_RANKS: tl.constexpr,
) -> tl.tensor:
    """NUM_RANKS columns of deflation from `first` on, of these features: (features, NUM_RANKS)."""
    ranks = first + tl.arange(0, NUM_RANKS)
    mask = (features < IN_FEATURES)[:, None] & (ranks < rank)[None, :]
    return tl.load(deflation + features[:, None] * rank + ranks[None, :], mask=mask, other=0.0)


@triton.jit
def _hidden_block(
    hidden: tl.tensor,
    first: tl.constexpr,
    num_tokens: int,
    rank: int,
    row_stride: int,
    FORMAT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    NUM_RANKS: tl.constexpr,
) -> tl.tensor:
    """NUM_RANKS columns of hidden from `first` on, of this program's rows in `_hidden_order`: (rows, NUM_RANKS)."""
    rows = tl.program_id(0) * BLOCK_ROWS + _hidden_order(BLOCK_ROWS)
    ranks = first + tl.arange(0, NUM_RANKS)
    mask = (rows < num_tokens)[:, None] & (ranks < rank)[None, :]
    block = tl.load(hidden + rows.to(tl.int64)[:, None] * row_stride + ranks[None, :], mask=mask, other=0.0)
    if FORMAT.is_interpreted:  # which cannot multiply bfloat16; in float32 the products are the same
        block = block.to(tl.float32)
    return block


@triton.jit
def _deflated(
    hidden: tl.tensor,
    more_hidden: tl.tensor,
    deflation: tl.tensor,
    start: tl.tensor,
    rank: int,
    IN_FEATURES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """hidden · deflationᵀ, (rows, BLOCK_COLUMNS) float32, from a block of hidden for each half of the rank.

    A tensor core leaves, of sixteen rows and eight columns, two rows and two columns each with four neighbouring
    threads. Rows and columns are given to it in such an order (`_hidden_order` is that of the rows) that each of the
    four ends up with a quarter of the columns in a row: whole groups of 16, whose largest number and sum of errors no
    other thread has a part in, and as many numbers as are loaded and stored at once, in the very threads that do it.
    That holds while no two warps share rows; the compiler sees to it for a sum of two products, and so the rank is
    halved. Any other order of the hardware's would cost time and change nothing.
    """
    ROWS: tl.constexpr = hidden.shape[0]
    QUARTER: tl.constexpr = BLOCK_COLUMNS // 4
    n = tl.arange(0, BLOCK_COLUMNS)
    features = start + (n % 8 // 2) * QUARTER + n // 8 * 2 + n % 2
    block = _deflation_block(deflation, features, 0, rank, IN_FEATURES, hidden.shape[1])
    product = tl.dot(hidden, tl.trans(block.to(hidden.dtype)), input_precision="ieee")
    block = _deflation_block(deflation, features, hidden.shape[1], rank, IN_FEATURES, hidden.shape[1])
    product = tl.dot(more_hidden, tl.trans(block.to(hidden.dtype)), product, input_precision="ieee")
    product = tl.reshape(product, (ROWS // 16, 2, 8, BLOCK_COLUMNS // 8, 4, 2))
    return tl.reshape(tl.permute(product, (1, 0, 2, 4, 3, 5)), (ROWS, BLOCK_COLUMNS))


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
    """What is stored of (rows, groups, group), the scale of each group, and which groups do not fit FP8."""
    is_low = tl.zeros((grouped.shape[0], grouped.shape[1]), tl.int1)
    magnitude = float_of_bits(magnitude_bits(grouped))
    if not ALL_EIGHT_BITS:
        scale, amax, tile = round_groups(magnitude, row_amax, ratio, FORMAT)
        unit = scale
        if OUTPUT == "fp8":  # a row with NaN or infinity is told by its scale, and holds zeros
            unit *= power_of_two(-base_exponent)[:, None]
            unit = tl.where((magnitude_bits(row_amax) < INFINITY_BITS)[:, None], unit, 0.0)
            if FORMAT.octaves is None:
                is_low = (amax > 0) & (unit < 2.0 ** (FORMAT.fp8_top_exponent - FORMAT.fp8_octaves))
        if OUTPUT != "int8":
            tile *= unit[:, :, None]
    if HAS_EIGHT_BITS:
        number, row_scale = round_to_eight_bits(magnitude, row_amax, FORMAT)
        eight_bit_scale = tl.broadcast_to(row_scale[:, None], (grouped.shape[0], grouped.shape[1]))
        if OUTPUT == "bf16":
            number *= row_scale[:, None, None]
        if OUTPUT == "fp8":
            number = tl.where((magnitude_bits(row_amax) < INFINITY_BITS)[:, None, None], number, 0.0)
        if ALL_EIGHT_BITS:
            tile = number
            scale = eight_bit_scale
        else:
            tile = tl.where(is_eight[:, None, None], number, tile)
            scale = tl.where(is_eight[:, None], eight_bit_scale, scale)
            is_low &= (is_eight == 0)[:, None]
    return with_sign_of(tile, grouped), scale, is_low


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
    reciprocal_factor: tl.tensor,
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
    ROTATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HALF_RANK: tl.constexpr,
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
    more_hidden = None
    if deflation is not None:
        hidden_block = _hidden_block(hidden, 0, num_tokens, rank, hidden_row_stride, FORMAT, BLOCK_ROWS, HALF_RANK)
        more_hidden = _hidden_block(
            hidden, HALF_RANK, num_tokens, rank, hidden_row_stride, FORMAT, BLOCK_ROWS, HALF_RANK
        )

    row_bits = tl.zeros((BLOCK_ROWS,), tl.int32)
    if OUTPUT == "fp8" or HAS_EIGHT_BITS or FORMAT.octaves is not None:
        for start in range(0, IN_FEATURES, BLOCK_COLUMNS):
            z = input_tile(
                x_rows, hidden_block, more_hidden, smoothing_factor, reciprocal_factor, deflation, input_offset,
                start, row_mask, rank, IN_FEATURES, FORMAT, ROTATED, BLOCK_COLUMNS,
            )  # fmt: skip
            row_bits = tl.maximum(row_bits, tl.max(magnitude_bits(z), axis=1))
    row_amax = float_of_bits(row_bits)
    base_exponent = row_base_exponent(largest_scale(row_amax, ratio, FORMAT), FORMAT.fp8_top_exponent)

    outside_groups = tl.zeros((BLOCK_ROWS, GROUPS), tl.int1)
    for start in range(0, IN_FEATURES, BLOCK_COLUMNS):
        z = input_tile(
            x_rows, hidden_block, more_hidden, smoothing_factor, reciprocal_factor, deflation, input_offset,
            start, row_mask, rank, IN_FEATURES, FORMAT, ROTATED, BLOCK_COLUMNS,
        )  # fmt: skip
        grouped = tl.reshape(z, (BLOCK_ROWS, GROUPS, FORMAT.group))
        tile, tile_scale, is_low = _rounded_tile(
            grouped, row_amax, ratio, is_eight, base_exponent, FORMAT, OUTPUT, ALL_EIGHT_BITS, HAS_EIGHT_BITS
        )
        outside_groups |= is_low
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
        outside_rows = tl.max(outside_groups.to(tl.int32), axis=1) > 0
        outside_rows &= row_mask & (row_bits < INFINITY_BITS)
        tl.store(outside + rows, outside_rows, mask=row_mask)
