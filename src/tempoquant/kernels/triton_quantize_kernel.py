"""The kernel of `triton_quantize`: a program rounds a few tokens, with separate code for four bits
and eight.
"""

import triton
import triton.language as tl

from tempoquant.kernels.triton_bits import (
    INFINITY_BITS,
    larger_of,
    largest_of,
    magnitude_bits,
    power_of_two,
    to_bfloat16,
    with_sign_of,
)
from tempoquant.kernels.triton_decode import scale_byte
from tempoquant.kernels.triton_e2m1 import round_groups_to_codes
from tempoquant.kernels.triton_eight_bits import eight_bit_scale, to_eight_bits
from tempoquant.kernels.triton_quantize_input import input_tile, source_of
from tempoquant.kernels.triton_rounding import INTEGER_ROUNDER, round_groups
from tempoquant.kernels.triton_scales import USUAL_MIN, is_usual, largest_scale, row_base_exponent

EIGHT_BIT_TILES = tl.constexpr(2)
"""Tiles that a loop over eight bits takes each time around: so little is done with a number that
loops would cost.
"""


@triton.jit(do_not_specialize=["num_tokens", "rows_per_clip_ratio", "rows_per_flag"])
def quantize_kernel(  # noqa: PLR0913
    x: tl.tensor, hidden: tl.tensor, columns: tl.tensor, deflation: tl.tensor,
    clip_ratio: tl.tensor, eight_bits: tl.tensor, values: tl.tensor, scale: tl.tensor, outside: tl.tensor,
    num_tokens: int, rank: int, x_row_stride: int, hidden_row_stride: int, rows_per_clip_ratio: int,
    rows_per_flag: int,
    IN_FEATURES: tl.constexpr, FORMAT: tl.constexpr, OUTPUT: tl.constexpr, ALL_EIGHT_BITS: tl.constexpr,
    HAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PRODUCT_RANK: tl.constexpr,
) -> None:  # fmt: skip
    """Round rows from `program_id · BLOCK_ROWS` on. The parameters are those of
    `quantize_launch`.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_tokens
    source = source_of(
        x, hidden, columns, deflation, first_row, num_tokens, rank, x_row_stride, hidden_row_stride,
        FORMAT, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT_RANK,
    )  # fmt: skip
    result = (values, scale, outside)
    ratios = clip_ratio + tl.minimum(rows, num_tokens - 1) // rows_per_clip_ratio
    if ALL_EIGHT_BITS:
        _round_to_eight(source, result, rows, row_mask, rank, IN_FEATURES, FORMAT, OUTPUT, HAS, BLOCK_COLUMNS)
    elif eight_bits is None:
        ratio = tl.load(ratios)
        _round_to_four(source, result, ratio, rows, row_mask, rank, IN_FEATURES, FORMAT, OUTPUT, HAS, BLOCK_COLUMNS)
    else:  # most programs have rows of one kind; where both meet, each kind's code stores its own rows
        is_eight = tl.load(eight_bits + rows // rows_per_flag, mask=row_mask, other=0) != 0
        is_four = row_mask & (is_eight == 0)
        if tl.max(is_eight.to(tl.int32), axis=0) > 0:
            _round_to_eight(source, result, rows, is_eight, rank, IN_FEATURES, FORMAT, OUTPUT, HAS, BLOCK_COLUMNS)
        if tl.max(is_four.to(tl.int32), axis=0) > 0:
            ratio = tl.load(ratios)
            _round_to_four(source, result, ratio, rows, is_four, rank, IN_FEATURES, FORMAT, OUTPUT, HAS, BLOCK_COLUMNS)


@triton.jit
def _round_to_eight(  # noqa: PLR0913
    source: tl.tuple, result: tl.tuple, rows: tl.tensor, stored: tl.tensor, rank: int,
    IN_FEATURES: tl.constexpr, FORMAT: tl.constexpr, OUTPUT: tl.constexpr, HAS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the rows of the mask `stored` in eight bits: one pass for each row's largest number,
    and one to round.
    """
    values, scale, outside = result
    amax = tl.zeros((rows.shape[0], BLOCK_COLUMNS // 16), tl.float32)
    for start in tl.range(0, IN_FEATURES, BLOCK_COLUMNS, loop_unroll_factor=EIGHT_BIT_TILES):
        z = input_tile(source, start, rank, IN_FEATURES, FORMAT, HAS, BLOCK_COLUMNS)
        grouped = tl.reshape(z, (rows.shape[0], BLOCK_COLUMNS // 16, 16))
        amax = larger_of(amax, largest_of(grouped, FORMAT.is_interpreted), FORMAT.is_interpreted)
    row_amax = largest_of(amax, FORMAT.is_interpreted)
    for start in tl.range(0, IN_FEATURES, BLOCK_COLUMNS, loop_unroll_factor=EIGHT_BIT_TILES):
        z = input_tile(source, start, rank, IN_FEATURES, FORMAT, HAS, BLOCK_COLUMNS)
        tile = to_eight_bits(z, row_amax, OUTPUT, FORMAT)
        if OUTPUT == "bf16":
            tile = to_bfloat16(tile, not FORMAT.is_integer)
        _store_tile(values, tile, rows, stored, start, IN_FEATURES, BLOCK_COLUMNS)
    if OUTPUT == "fp8":
        tl.store(scale + rows, eight_bit_scale(row_amax, FORMAT), mask=stored)
    if OUTPUT == "int8":  # the scale of the row stands for each group
        NUM_GROUPS: tl.constexpr = IN_FEATURES // FORMAT.group
        row_scale = eight_bit_scale(row_amax, FORMAT)
        for group in range(NUM_GROUPS):
            tl.store(scale + rows.to(tl.int64) * NUM_GROUPS + group, row_scale, mask=stored)
    if outside is not None:
        tl.store(outside + rows, tl.zeros(rows.shape, tl.int1), mask=stored)


@triton.jit
def _round_to_four(  # noqa: PLR0913
    source: tl.tuple, result: tl.tuple, ratio: tl.tensor, rows: tl.tensor, stored: tl.tensor, rank: int,
    IN_FEATURES: tl.constexpr, FORMAT: tl.constexpr, OUTPUT: tl.constexpr, HAS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the rows of the mask `stored` in four bits.

    Facts of the whole row, the octave window and the base of FP8, are fixed beforehand for usual
    rows (`triton_scales.is_usual`): these are rounded in the pass that finds their largest number.
    A program with an unusual row makes a second pass over its rows, with that number known. INT4
    depends on no such fact; there the first pass omits the steps that only very large and small
    numbers and clip ratios below 1 need.
    """
    scale, outside = result[1], result[2]
    IS_TRIED: tl.constexpr = OUTPUT == "fp8" or FORMAT.octaves is not None or FORMAT.is_integer
    GROUPS: tl.constexpr = BLOCK_COLUMNS // FORMAT.group
    largest = tl.zeros((rows.shape[0], GROUPS), tl.float32)
    is_low = tl.zeros((rows.shape[0], GROUPS), tl.int1)
    base = tl.full(rows.shape, FORMAT.usual_exponent, tl.int32)
    if FORMAT.is_integer:
        if tl.min(ratio, axis=0) >= 1:
            largest, is_low = _walk(
                source, result, ratio, ratio, base, rows, stored, rank, IN_FEATURES, FORMAT, OUTPUT, HAS, IS_TRIED,
                BLOCK_COLUMNS,
            )  # fmt: skip
    else:
        largest, is_low = _walk(
            source, result, ratio, ratio, base, rows, stored, rank, IN_FEATURES, FORMAT, OUTPUT, HAS, IS_TRIED,
            BLOCK_COLUMNS,
        )  # fmt: skip
    if IS_TRIED:
        row_amax = largest_of(largest, FORMAT.is_interpreted)
        is_finite = magnitude_bits(row_amax) < INFINITY_BITS
        is_settled = is_usual(row_amax, ratio, FORMAT) & (tl.max(is_low.to(tl.int32), axis=1) == 0)
        if FORMAT.is_integer:  # without the first pass nothing is stored yet
            is_settled &= tl.min((ratio >= 1).to(tl.int32), axis=0) > 0
        is_outside = tl.zeros(rows.shape, tl.int1)
        if tl.max((stored & (is_settled == 0)).to(tl.int32), axis=0) > 0:
            base = row_base_exponent(largest_scale(row_amax, ratio, FORMAT), FORMAT.fp8_top_exponent)
            _, is_low = _walk(
                source, result, row_amax, ratio, base, rows, stored, rank, IN_FEATURES, FORMAT, OUTPUT, HAS, False,
                BLOCK_COLUMNS,
            )  # fmt: skip
            is_outside = (tl.max(is_low.to(tl.int32), axis=1) > 0) & is_finite
        if OUTPUT == "fp8":
            row_scale = tl.where(is_finite, power_of_two(base), float("nan"))
            tl.store(scale + rows, row_scale, mask=stored)
        if outside is not None:
            tl.store(outside + rows, is_outside, mask=stored)


@triton.jit
def _walk(  # noqa: PLR0913
    source: tl.tuple, result: tl.tuple, row_amax: tl.tensor, ratio: tl.tensor, base_exponent: tl.tensor,
    rows: tl.tensor, stored: tl.tensor, rank: int,
    IN_FEATURES: tl.constexpr, FORMAT: tl.constexpr, OUTPUT: tl.constexpr, HAS: tl.constexpr, IS_TRIED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Round and store all tiles of the rows.

    Returns, by rows and places of groups in a tile, the largest amax (if IS_TRIED), and whether a
    group did not fit.
    """
    GROUPS: tl.constexpr = BLOCK_COLUMNS // FORMAT.group
    largest = tl.zeros((rows.shape[0], GROUPS), tl.float32)
    is_low = tl.zeros((rows.shape[0], GROUPS), tl.int1)
    for start in range(0, IN_FEATURES, BLOCK_COLUMNS):
        z = input_tile(source, start, rank, IN_FEATURES, FORMAT, HAS, BLOCK_COLUMNS)
        amax, is_lower = _round_tile(
            z, result, row_amax, ratio, base_exponent, rows, stored, start, IN_FEATURES, FORMAT, OUTPUT, IS_TRIED,
            BLOCK_COLUMNS,
        )  # fmt: skip
        if IS_TRIED:
            largest = larger_of(largest, amax, FORMAT.is_interpreted)
        is_low |= is_lower
    return largest, is_low


@triton.jit
def _round_tile(  # noqa: PLR0913
    z: tl.tensor, result: tl.tuple, row_amax: tl.tensor, ratio: tl.tensor, base_exponent: tl.tensor, rows: tl.tensor,
    stored: tl.tensor, start: tl.tensor,
    IN_FEATURES: tl.constexpr, FORMAT: tl.constexpr, OUTPUT: tl.constexpr, IS_TRIED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Round and store a tile; return the amax of each group, and the groups that do not fit into
    FP8 relative to the base.
    """
    values, scale, _ = result
    GROUPS: tl.constexpr = BLOCK_COLUMNS // FORMAT.group
    grouped = tl.reshape(z, (z.shape[0], GROUPS, FORMAT.group))
    is_low = tl.zeros((z.shape[0], GROUPS), tl.int1)
    if OUTPUT == "fp4":
        group_scale, amax, packed = round_groups_to_codes(grouped, row_amax, ratio, FORMAT, IS_TRIED)
        _store_tile(values, packed, rows, stored, start // 2, IN_FEATURES // 2, BLOCK_COLUMNS // 2)
        group_scale = scale_byte(group_scale, FORMAT)
    else:
        group_scale, amax, tile = round_groups(grouped, row_amax, ratio, FORMAT, IS_TRIED)
        unit = group_scale
        if OUTPUT == "fp8":
            unit *= power_of_two(-base_exponent)[:, None]
            if FORMAT.octaves is None:
                is_low = (amax > 0) & (unit < 2.0 ** (FORMAT.fp8_top_exponent - FORMAT.fp8_octaves))
        if FORMAT.is_integer and IS_TRIED:
            is_low = (amax > 0) & (amax < USUAL_MIN)
        if OUTPUT == "bf16" and FORMAT.is_integer:
            tile = (tile + INTEGER_ROUNDER) - INTEGER_ROUNDER
        if OUTPUT == "fp8" or OUTPUT == "bf16":
            tile *= unit[:, :, None]
        flat = tl.reshape(with_sign_of(tile, grouped), (z.shape[0], BLOCK_COLUMNS))
        if OUTPUT == "bf16":
            flat = to_bfloat16(flat, not FORMAT.is_integer)
        if OUTPUT == "int8":  # the last byte of such a sum is the integer
            flat = (flat + INTEGER_ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
        _store_tile(values, flat, rows, stored, start, IN_FEATURES, BLOCK_COLUMNS)
    if OUTPUT == "int8" or OUTPUT == "fp4":
        _store_tile(scale, group_scale, rows, stored, start // FORMAT.group, IN_FEATURES // FORMAT.group, GROUPS)
    return amax, is_low


@triton.jit
def _store_tile(
    values: tl.tensor, tile: tl.tensor, rows: tl.tensor, stored: tl.tensor, start: tl.tensor,
    IN_FEATURES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Write a tile's rows that are `stored`, in the type that `values` points to."""
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    mask = stored[:, None]
    if IN_FEATURES % BLOCK_COLUMNS != 0:
        mask = mask & (columns < IN_FEATURES)[None, :]
    places = values + rows.to(tl.int64)[:, None] * IN_FEATURES + columns[None, :]
    tl.store(places, tile.to(values.dtype.element_ty), mask=mask)
