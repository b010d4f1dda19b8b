"""The backend int8: INT4 codes, or codes of eight bits, on integer tensor cores (Ampere and up).

    y = Σ over groups (Σ within the group of codes · codes)
        · scale[token, group] · weight_scale[output, group] + hidden · upᵀ + bias

Sums within a group are exact integers; they are scaled and summed in float32, and y is rounded
once.
"""

import torch
import triton
import triton.language as tl

from tempoquant.errors import UnsupportedError
from tempoquant.formats import Format
from tempoquant.kernels.launch import Launch, NamedLaunches, dense, with_rows
from tempoquant.kernels.quantize_to import quantize_to_int8 as quantize_input
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_expand import expand_to_int8
from tempoquant.kernels.triton_gemm import (
    Tile,
    Tiles,
    capability_of,
    is_interpreted,
    new_output,
    newest_served,
    tile_for,
)
from tempoquant.kernels.triton_tile import ROWS_AT_ONCE, finish, place_of_tile, rank_blocks, row_starts

__all__ = ["int8_multiply", "multiply", "quantize_input"]

# A tile is (tokens, outputs) here; `inner` is the group. Each program holds the sums of a group
# beside its totals.
TILES: Tiles = {
    80: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
    86: (Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4)),
}
MIN_GROUP = 32  # what integer tensor cores take of K at least

# 1.5 · 2^23 and its bits: an integer n of less than 2^22 added to the bits is the float32 1.5 ·
# 2^23 + n. Sums start from the bits, so that one subtraction makes them float32, at four times the
# rate of a conversion.
_FLOAT_OF_ZERO = tl.constexpr(12582912.0)
_BITS_OF_ZERO = tl.constexpr(0x4B400000)
_LARGEST_SUM = 2**22 - 1


@triton.jit
def _column(matrix: tl.tensor, place: tl.constexpr) -> tl.tensor:
    """Return a column of (rows, 1 or 2), as (rows,)."""
    if matrix.shape[1] == 1:
        return tl.reshape(matrix, (matrix.shape[0],))
    first, second = tl.split(matrix)
    if place == 0:
        return first
    return second


@triton.jit
def int8_gemm_kernel(  # noqa: PLR0913
    values: tl.tensor, weight: tl.tensor, y: tl.tensor, scale: tl.tensor, weight_scale: tl.tensor, hidden:
    tl.tensor, up: tl.tensor, bias: tl.tensor,
    num_tokens: int, num_outputs: int, rank: int,
    values_stride: int, weight_stride: int, y_stride: int, hidden_stride: int, up_stride: int,
    scale_stride: int, scale_group_stride: int, weight_scale_stride: int, weight_scale_group_stride: int,
    NUM_GROUPS: tl.constexpr, AT_ONCE: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, RANKS: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Compute a tile of y, TOKENS × OUTPUTS, with AT_ONCE groups a step."""
    first_token, first_output = place_of_tile(num_tokens, num_outputs, TOKENS, OUTPUTS, ROWS_AT_ONCE)
    inner = tl.arange(0, GROUP)[None, :]
    values_rows = row_starts(values, first_token, num_tokens, values_stride, TOKENS) + inner
    weight_rows = row_starts(weight, first_output, num_outputs, weight_stride, OUTPUTS) + inner
    scale_rows = row_starts(scale, first_token, num_tokens, scale_stride, TOKENS)
    weight_scale_rows = row_starts(weight_scale, first_output, num_outputs, weight_scale_stride, OUTPUTS)
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    ahead = tl.arange(0, AT_ONCE)[None, :]
    x_scales = tl.load(scale_rows + ahead * scale_group_stride)
    w_scales = tl.load(weight_scale_rows + ahead * weight_scale_group_stride)
    for first in range(0, NUM_GROUPS, AT_ONCE):
        # The compiler fetches ahead what a product reads, not its scales.
        following = min(first + AT_ONCE, NUM_GROUPS - AT_ONCE)
        next_x_scales = tl.load(scale_rows + (following + ahead) * scale_group_stride)
        next_w_scales = tl.load(weight_scale_rows + (following + ahead) * weight_scale_group_stride)
        for place in tl.static_range(AT_ONCE):
            x = tl.load(values_rows + (first + place) * GROUP)
            w = tl.load(weight_rows + (first + place) * GROUP)
            start = tl.full((TOKENS, OUTPUTS), _BITS_OF_ZERO, dtype=tl.int32)
            sums = tl.dot(x, w.T, start, out_dtype=tl.int32).to(tl.float32, bitcast=True) - _FLOAT_OF_ZERO
            total += sums * _column(x_scales, place)[:, None] * _column(w_scales, place)[None, :]
        x_scales, w_scales = next_x_scales, next_w_scales
    is_stored = first_token + tl.arange(0, TOKENS) < num_tokens
    finish(
        total, y, None, None, hidden, up, bias, is_stored, first_token, first_output, num_tokens, num_outputs, rank,
        y_stride, 0, hidden_stride, up_stride, TOKENS, OUTPUTS, RANKS, RANK_BLOCKS, UPCAST,
    )  # fmt: skip


def multiply(quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """Compute the product of a linear with branch and bias: (tokens, out) in `dtype`. The expanded
    codes live as long as the product.
    """
    codes, scale = expand_to_int8(weight, format)
    return int8_multiply(quantized, codes, scale, weight.up, weight.bias, dtype)


def int8_gemm_launch(
    quantized: QuantizedInput,
    codes: torch.Tensor,
    scale: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tile: Tile,
) -> Launch:
    """Return the launch that fills y (tokens, out), of any float dtype; the other arguments are
    those of `int8_multiply`.
    """
    values, x_scale, hidden = quantized.values, quantized.scale, quantized.hidden
    assert x_scale is not None
    rank = 0 if up is None else up.shape[1]
    if rank == 0:
        hidden = up = None
    return Launch(
        int8_gemm_kernel,
        (triton.cdiv(len(values), tile.tokens) * triton.cdiv(len(codes), tile.outputs),),
        {
            "values": values, "weight": codes, "y": y, "scale": x_scale, "weight_scale": scale, "hidden": hidden,
            "up": up, "bias": bias, "num_tokens": len(values), "num_outputs": len(codes),
            "rank": rank,
            "values_stride": values.stride(0), "weight_stride": codes.stride(0), "y_stride": y.stride(0),
            "hidden_stride": 0 if hidden is None else hidden.stride(0), "up_stride": 0 if up is None else up.stride(0),
            "scale_stride": x_scale.stride(0), "scale_group_stride": x_scale.stride(1),
            "weight_scale_stride": scale.stride(0), "weight_scale_group_stride": scale.stride(1),
            "UPCAST": is_interpreted(), "TOKENS": tile.tokens, "OUTPUTS": tile.outputs,
            "NUM_GROUPS": scale.shape[1], "AT_ONCE": 1 if scale.shape[1] % 2 else 2,
            "GROUP": values.shape[1] // scale.shape[1], **rank_blocks(rank), "ROWS_AT_ONCE": ROWS_AT_ONCE,
        },
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )  # fmt: skip


def int8_multiply(
    quantized: QuantizedInput,
    codes: torch.Tensor,
    scale: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute one linear.

    Args:
        quantized: values int8, scale (tokens, groups) of any strides (0 along groups for one scale
            a token).
        codes: (out, in) int8. scale: (out, groups) float32 of any strides.
        up: (out, rank) bfloat16, or None. bias: (out,), or None.
        dtype: of the result.

    Returns:
        (tokens, out). Raises UnsupportedError for groups of fewer than 32 or of more than 256.
    """
    values, codes, up, bias = with_rows(quantized.values), with_rows(codes), with_rows(up), dense(bias)
    quantized = quantized._replace(values=values, hidden=with_rows(quantized.hidden))
    group = values.shape[1] // scale.shape[1]
    if not MIN_GROUP <= group <= _LARGEST_SUM // 128**2:
        raise UnsupportedError(f"the INT8 product takes groups of 32 to 255, not of {group}: use the backend bf16.")
    y = new_output(values, len(codes), dtype)
    tile = tile_for(TILES, len(values), capability_of(values.device))
    int8_gemm_launch(quantized, codes, scale, up, bias, y, tile).run()
    return y.to(dtype)


def specializations() -> NamedLaunches:
    """Return the launches of Wan2.2."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for capability, (many, few) in TILES.items():
        for tile, num_tokens in ((many, 32_760), (few, 1)):
            for rank in (0, 32):
                quantized = QuantizedInput(
                    meta(num_tokens, 5120, dtype=torch.int8), meta(num_tokens, 80, dtype=torch.float32),
                    meta(num_tokens, rank) if rank else None, None,
                )  # fmt: skip
                launch = int8_gemm_launch(
                    quantized, meta(5120, 5120, dtype=torch.int8), meta(5120, 80, dtype=torch.float32),
                    meta(5120, rank) if rank else None, meta(5120), meta(num_tokens, 5120), tile,
                )  # fmt: skip
                yield (
                    f"cc {capability}, {num_tokens} tokens, rank {rank}",
                    launch._replace(min_capability=capability, max_capability=newest_served(TILES, capability)),
                )
