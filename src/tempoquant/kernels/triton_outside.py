"""Tokens of MXFP4 whose group scales span more octaves than FP8 holds: kept in four bits, and
multiplied in bfloat16.

Such a token is rare (a group 2^14 times smaller than another, and not zero), but MXFP4 allows it.
Its row of FP8 values has room for the stored form of a weight's row, packed codes followed by scale
bytes, so that no further memory is allocated. The FP8 product gives a meaningless result for that
row only; `replace_outside_rows` rewrites it. There is no host synchronization to find out whether
there are any: programs that find none end at once.
"""

import torch
import triton
import triton.language as tl

from tempoquant.kernels.launch import NATIVE_FP8, Launch, NamedLaunches, dense, with_rows
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.triton_decode import level_of_nibble, load_scale
from tempoquant.kernels.triton_gemm import is_interpreted, new_output
from tempoquant.kernels.triton_tile import finish, rank_blocks, row_starts

GROUP = 32  # of MXFP4, the one format whose tokens may be outside
TOKENS, OUTPUTS, GROUPS = 64, 64, 2  # of a step: GROUPS · GROUP numbers of K
COLUMN_PROGRAMS = 16  # share the outputs of TOKENS tokens


@triton.jit
def outside_kernel(  # noqa: PLR0913
    stored: tl.tensor, outside: tl.tensor, weight: tl.tensor, y: tl.tensor, row_scale: tl.tensor, hidden: tl.tensor,
    up: tl.tensor, bias: tl.tensor,
    num_tokens: int, rank: int, weight_stride: int, y_stride: int, hidden_stride: int, up_stride: int,
    NUM_OUTPUTS: tl.constexpr, NUM_INNER: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, COLUMN_PROGRAMS: tl.constexpr,
    RANKS: tl.constexpr, RANK_BLOCKS: tl.constexpr,
) -> None:  # fmt: skip
    """Compute every COLUMN_PROGRAMS-th tile of outputs of TOKENS tokens, if one of these is
    outside.
    """
    first_token = tl.program_id(0) // COLUMN_PROGRAMS * TOKENS
    tokens = first_token + tl.arange(0, TOKENS)
    is_outside = tl.load(outside + tokens, mask=tokens < num_tokens, other=0) != 0
    if tl.max(is_outside.to(tl.int32), axis=0) > 0:
        for step in range(0, NUM_OUTPUTS, OUTPUTS * COLUMN_PROGRAMS):
            first_output = step + tl.program_id(0) % COLUMN_PROGRAMS * OUTPUTS
            if first_output < NUM_OUTPUTS:
                total = _product(
                    row_starts(stored, first_token, num_tokens, NUM_INNER, TOKENS),
                    row_starts(weight, first_output, NUM_OUTPUTS, weight_stride, OUTPUTS),
                    NUM_INNER, GROUP, UPCAST, TOKENS, OUTPUTS, GROUPS,
                )  # fmt: skip
                finish(
                    total, y, None, row_scale, hidden, up, bias, is_outside, first_token, first_output, num_tokens,
                    NUM_OUTPUTS, rank, y_stride, 1, hidden_stride, up_stride, TOKENS, OUTPUTS, RANKS, RANK_BLOCKS,
                    UPCAST,
                )  # fmt: skip


@triton.jit
def _product(
    stored_rows: tl.tensor, weight_rows: tl.tensor, NUM_INNER: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Multiply stored numbers by an FP8 weight, in bfloat16, summed in float32: (TOKENS,
    OUTPUTS).
    """
    total = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    for first_group in range(0, NUM_INNER // GROUP, GROUPS):
        x = _load_packed(stored_rows, first_group, NUM_INNER, GROUP, GROUPS)
        inner = first_group * GROUP + tl.arange(0, GROUPS * GROUP)[None, :]
        w = tl.load(weight_rows + inner, mask=inner < NUM_INNER, other=0.0)
        if UPCAST:  # the interpreter cannot multiply bfloat16
            total = tl.dot(x, w.to(tl.float32).T, total)
        else:
            total = tl.dot(x.to(tl.bfloat16), w.to(tl.bfloat16).T, total)
    return total


@triton.jit
def _load_packed(
    stored_rows: tl.tensor, first_group: tl.tensor, NUM_INNER: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr
) -> tl.tensor:
    """Load GROUPS groups of rows that `triton_quantize_outside` wrote: (rows, GROUPS · GROUP)
    float32, exact in bfloat16.
    """
    NUM_GROUPS: tl.constexpr = NUM_INNER // GROUP
    groups = first_group + tl.arange(0, GROUPS)[None, :]
    scale = load_scale(stored_rows, NUM_INNER // 2 + groups, groups < NUM_GROUPS, "e8m0")
    places = first_group * (GROUP // 2) + tl.arange(0, GROUPS * GROUP // 2)[None, :]
    packed = tl.load(stored_rows + places, mask=places < NUM_INNER // 2, other=0).to(tl.int32)
    level = tl.join(level_of_nibble(packed & 0xF, False), level_of_nibble(packed >> 4, False))
    grouped = tl.reshape(level, (level.shape[0], GROUPS, GROUP)) * scale[:, :, None]
    return tl.reshape(grouped, (level.shape[0], GROUPS * GROUP))


def outside_launch(
    quantized: QuantizedInput,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> Launch:
    """Return the launch that rewrites the outside rows of y; the arguments are those of
    `replace_outside_rows`.
    """
    values, hidden = quantized.values, quantized.hidden
    rank = 0 if up is None else up.shape[1]
    if rank == 0:
        hidden = up = None
    return Launch(
        outside_kernel,
        (triton.cdiv(len(values), TOKENS) * COLUMN_PROGRAMS,),
        {
            "stored": values.view(torch.uint8), "outside": quantized.outside, "weight": weight, "y": y,
            "row_scale": row_scale, "hidden": hidden, "up": up, "bias": bias, "num_tokens": len(values), "rank": rank,
            "weight_stride": weight.stride(0), "y_stride": y.stride(0),
            "hidden_stride": 0 if hidden is None else hidden.stride(0), "up_stride": 0 if up is None else up.stride(0),
            "NUM_OUTPUTS": len(weight), "NUM_INNER": values.shape[1], "GROUP": GROUP, "UPCAST": is_interpreted(),
            "TOKENS": TOKENS, "OUTPUTS": OUTPUTS, "GROUPS": GROUPS, "COLUMN_PROGRAMS": COLUMN_PROGRAMS,
            **rank_blocks(rank),
        },
        {"num_warps": 4, "num_stages": 3},
        NATIVE_FP8,
    )  # fmt: skip


def replace_outside_rows(
    y: torch.Tensor,
    quantized: QuantizedInput,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Rewrite the rows of y whose tokens are outside; the other arguments are those of the FP8
    product.

    Args:
        y: (tokens, out), contiguous, changed in place.
        quantized: `triton_quantize_outside` wrote its values of an outside row.

    Returns:
        y.
    """
    values, hidden, outside = dense(quantized.values), with_rows(quantized.hidden), dense(quantized.outside)
    quantized = quantized._replace(values=values, hidden=hidden, outside=outside)
    weight, row_scale, up, bias = with_rows(weight), dense(row_scale), with_rows(up), dense(bias)
    if is_interpreted():  # the interpreter truncates bfloat16 instead of rounding
        rows = new_output(quantized.values, len(weight), y.dtype)
        outside_launch(quantized, weight, row_scale, up, bias, rows).run()
        assert quantized.outside is not None
        return y.copy_(torch.where(quantized.outside[:, None], rows.to(y.dtype), y))
    outside_launch(quantized, weight, row_scale, up, bias, y).run()
    return y


def specializations() -> NamedLaunches:
    """Return the launches of Wan2.2."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    e4m3, num_tokens = torch.float8_e4m3fn, 32_760
    for rank in (0, 32):
        quantized = QuantizedInput(
            meta(num_tokens, 5120, dtype=e4m3), meta(num_tokens, dtype=torch.float32),
            meta(num_tokens, rank) if rank else None, meta(num_tokens, dtype=torch.bool),
        )  # fmt: skip
        yield f"mxfp4, rank {rank}", outside_launch(
            quantized, meta(5120, 5120, dtype=e4m3), meta(5120, dtype=torch.float32),
            meta(5120, rank) if rank else None, meta(5120), meta(num_tokens, 5120),
        )  # fmt: skip
