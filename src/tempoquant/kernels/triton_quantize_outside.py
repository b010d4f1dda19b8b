"""Tokens of MXFP4 whose scales FP8 cannot hold, in the form that `triton_outside` multiplies:
codes, then scale bytes.

It is a separate kernel after `quantize_kernel`, so that it does not slow that one. Programs without
such a token end at once, and take few tokens each, since one such token keeps a program running.
"""

import triton
import triton.language as tl

from tempoquant.kernels.launch import Launch
from tempoquant.kernels.triton_bits import with_sign_of
from tempoquant.kernels.triton_decode import E2M1_UNIT
from tempoquant.kernels.triton_quantize_input import input_tile, source_of
from tempoquant.kernels.triton_rounding import round_groups

BLOCK_ROWS, BLOCK_COLUMNS, NUM_WARPS = 16, 64, 4


@triton.jit
def store_packed(
    stored: tl.tensor, rows: tl.tensor, mask: tl.tensor, first_group: tl.tensor, scale: tl.tensor, level: tl.tensor,
    IN_FEATURES: tl.constexpr,
) -> None:  # fmt: skip
    """Write groups of the rows in `mask`, from `first_group` on, as codes and scale bytes.

    stored: pointer to bytes, IN_FEATURES a row. scale: (rows, groups) powers of two. level: (rows,
    groups, GROUP).
    """
    GROUP: tl.constexpr = level.shape[2]
    NUM_GROUPS: tl.constexpr = IN_FEATURES // GROUP
    BYTES: tl.constexpr = level.shape[1] * GROUP // 2
    row_starts = stored + rows.to(tl.int64)[:, None] * IN_FEATURES
    magnitude = (tl.abs(level) * (1 / E2M1_UNIT)).to(tl.int32, bitcast=True) >> 22
    nibble = tl.where(level < 0, magnitude + 8, magnitude)
    place_value = tl.where(tl.arange(0, 2) == 0, 1, 16)[None, None, :]
    packed = tl.sum(tl.reshape(nibble, (level.shape[0], BYTES, 2)) * place_value, axis=2)
    places = first_group * (GROUP // 2) + tl.arange(0, BYTES)
    is_inside = mask[:, None] & (places < IN_FEATURES // 2)[None, :]
    tl.store(row_starts + places[None, :], packed.to(tl.uint8), mask=is_inside)
    groups = first_group + tl.arange(0, level.shape[1])
    exponent = (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
    is_inside = mask[:, None] & (groups < NUM_GROUPS)[None, :]
    tl.store(row_starts + IN_FEATURES // 2 + groups[None, :], exponent.to(tl.uint8), mask=is_inside)


@triton.jit(do_not_specialize=["num_tokens", "rows_per_clip_ratio"])
def quantize_outside_kernel(  # noqa: PLR0913
    x: tl.tensor, hidden: tl.tensor, columns: tl.tensor, deflation: tl.tensor, clip_ratio: tl.tensor,
    values: tl.tensor, outside: tl.tensor,
    num_tokens: int, rank: int, x_row_stride: int, hidden_row_stride: int, rows_per_clip_ratio: int,
    IN_FEATURES: tl.constexpr, FORMAT: tl.constexpr, HAS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, PRODUCT_RANK: tl.constexpr,
) -> None:  # fmt: skip
    """Write those of the rows from `program_id · BLOCK_ROWS` on that are outside. The parameters
    are `quantize_kernel`'s.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < num_tokens
    is_outside = tl.load(outside + rows, mask=row_mask, other=0) != 0
    if tl.max(is_outside.to(tl.int32), axis=0) > 0:
        ratio = tl.load(clip_ratio + rows // rows_per_clip_ratio, mask=row_mask, other=1.0)
        source = source_of(
            x, hidden, columns, deflation, tl.program_id(0) * BLOCK_ROWS, num_tokens, rank,
            x_row_stride, hidden_row_stride, FORMAT, BLOCK_ROWS, BLOCK_COLUMNS, PRODUCT_RANK,
        )  # fmt: skip
        no_window = tl.zeros((BLOCK_ROWS,), tl.float32)  # MXFP4's scales do not depend on the row's
        stored = values.to(tl.pointer_type(tl.uint8), bitcast=True)
        for start in range(0, IN_FEATURES, BLOCK_COLUMNS):
            z = input_tile(source, start, rank, IN_FEATURES, FORMAT, HAS, BLOCK_COLUMNS)
            grouped = tl.reshape(z, (BLOCK_ROWS, BLOCK_COLUMNS // FORMAT.group, FORMAT.group))
            scale, _, level = round_groups(grouped, no_window, ratio, FORMAT, False)
            level = with_sign_of(level, grouped)
            store_packed(stored, rows, is_outside, start // FORMAT.group, scale, level, IN_FEATURES)


def quantize_outside_launch(launch: Launch) -> Launch:
    """Return the launch that follows a launch of `quantize_kernel` with `outside`, with the same
    arguments.
    """
    own = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    arguments = {name: own.get(name, launch.arguments.get(name)) for name in quantize_outside_kernel.arg_names}
    grid = (triton.cdiv(launch.arguments["num_tokens"], BLOCK_ROWS),)
    options = {**launch.options, "num_warps": NUM_WARPS}
    return Launch(quantize_outside_kernel, grid, arguments, options, launch.min_capability, launch.max_capability)
