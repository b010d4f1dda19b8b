"""Expansion of weights from 4 bits to tensor-core operands, into a buffer that every layer of a
shape reuses.

    FP8    level · (group scale / row base), exact, for MXFP4 and NVFP4 of one mantissa bit;
           the row base is a power of two
    BF16   level · group scale; exact except INT4, whose product is rounded (2^-9 relative)
    INT8   the codes

A program expands a few rows, a piece of the columns at a time. Bytes moved per weight: half a byte
of codes and a sixteenth of scales (a thirty-second) in, one or two out. At tens of thousands of
tokens that is about one percent of the following product; only the buffer is kept.
"""

import torch
import triton
import triton.language as tl

from tempoquant.formats import FORMATS, Format, ScaleGrid, scale_from_bytes
from tempoquant.kernels.fp8_window import FP8_TOP_EXPONENT, check_fp8, check_int8, dtypes_of
from tempoquant.kernels.launch import NATIVE_FP8, Launch, NamedLaunches, dense
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_bits import power_of_two, to_bfloat16
from tempoquant.kernels.triton_decode import level_of_nibble, load_scale
from tempoquant.kernels.triton_scales import row_base_exponent

# 32 numbers a thread and whole 32-byte stores; few rows, so that Wan's smallest weight still makes
# 1280 programs.
BLOCK_ROWS, BLOCK_COLUMNS, NUM_WARPS = 4, 1024, 4

OUTPUTS = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.int8: "int8"}


@triton.jit
def _expand_kernel(  # noqa: PLR0913
    packed: tl.tensor,
    scale: tl.tensor,
    tensor_scale: tl.tensor,
    values: tl.tensor,
    row_scale: tl.tensor,
    num_rows: int,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GRID: tl.constexpr,
    OUTPUT: tl.constexpr,
    TOP_EXPONENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
) -> None:
    """Expand rows from `program_id · BLOCK_ROWS` on, all columns. The parameters are those of
    `expand_launch`.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    groups = tl.arange(0, BLOCK_GROUPS)
    row_mask = rows < num_rows
    first_group = rows.to(tl.int64)[:, None] * NUM_GROUPS
    inverse_base = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if OUTPUT == "fp8":
        largest = tl.zeros((BLOCK_ROWS,), tl.float32)
        for start in range(0, NUM_GROUPS, BLOCK_GROUPS):
            mask = row_mask[:, None] & (start + groups < NUM_GROUPS)[None, :]
            stored = load_scale(scale, first_group + (start + groups)[None, :], mask, GRID)
            largest = tl.maximum(largest, tl.max(stored, axis=1))
        exponent = row_base_exponent(largest, TOP_EXPONENT)
        inverse_base = power_of_two(-exponent)
        base = power_of_two(exponent)
        if tensor_scale is not None:
            base *= tl.load(tensor_scale)
        tl.store(row_scale + rows, base, mask=row_mask)
    for start in range(0, NUM_GROUPS, BLOCK_GROUPS):
        group_mask = row_mask[:, None] & (start + groups < NUM_GROUPS)[None, :]
        offsets = first_group + (start + groups)[None, :]
        mask = group_mask[:, :, None]
        bytes_of_group = offsets[:, :, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, None, :]
        stored = tl.load(packed + bytes_of_group, mask=mask, other=0).to(tl.int32)
        low = level_of_nibble(stored & 0xF, GRID == "bf16")
        high = level_of_nibble(stored >> 4, GRID == "bf16")
        if OUTPUT != "int8":
            relative = (load_scale(scale, offsets, group_mask, GRID) * inverse_base[:, None])[:, :, None]
            low *= relative
            high *= relative
        expanded = tl.reshape(tl.join(low, high), (BLOCK_ROWS, BLOCK_GROUPS, GROUP))
        if OUTPUT == "bf16":
            expanded = to_bfloat16(expanded, GRID != "bf16")
        columns = offsets[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
        tl.store(values + columns, expanded.to(values.dtype.element_ty), mask=mask)


def expand_launch(
    weight: WeightTensors, format: Format, values: torch.Tensor, row_scale: torch.Tensor | None
) -> Launch:
    """Return the launch that expands a weight into `values` (out, in): FP8 if `row_scale` (out,) is
    given, or by dtype.
    """
    num_rows, half = weight.packed.shape
    grid, scale = format.scale_grid, dense(weight.scale)
    return Launch(
        _expand_kernel,
        (triton.cdiv(num_rows, BLOCK_ROWS),),
        {
            "packed": dense(weight.packed),
            "scale": scale.view(torch.int16) if grid is ScaleGrid.BF16 else scale,
            "tensor_scale": weight.tensor_scale,
            "values": values,
            "row_scale": row_scale,
            "num_rows": num_rows,
            "NUM_GROUPS": 2 * half // format.group_size,
            "GROUP": format.group_size,
            "GRID": grid.value,
            "OUTPUT": OUTPUTS[values.dtype],
            "TOP_EXPONENT": FP8_TOP_EXPONENT.get(grid, 0),
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_GROUPS": BLOCK_COLUMNS // format.group_size,
        },
        {"num_warps": NUM_WARPS, "enable_fp_fusion": False},
        NATIVE_FP8 if values.dtype == torch.float8_e4m3fn else 80,
    )


def expand_to_fp8(
    weight: WeightTensors, format: Format, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand a weight for FP8 tensor cores.

    Args:
        out: (out, in) float8_e4m3fn to write to; None for a new one.

    Returns:
        values (out, in) float8_e4m3fn and row_scale (out,) float32, whose product is the weight:
        exact in every row for which `fp8_exact_rows` is true. A row scale is a power of two times
        the tensor scale.

    Raises UnsupportedError for NVFP4 and INT4, whose scales have too many mantissa bits.
    """
    check_fp8(format)
    values = _buffer(weight, torch.float8_e4m3fn, out)
    row_scale = torch.empty(values.shape[0], dtype=torch.float32, device=values.device)
    expand_launch(weight, format, values, row_scale).run()
    return values, row_scale


def expand_to_bf16(weight: WeightTensors, format: Format, out: torch.Tensor | None = None) -> torch.Tensor:
    """Expand a weight for BF16 tensor cores *without* its tensor scale: (out, in) bfloat16, into
    `out` if given.

    The result is exact except for INT4, whose three bits of level times eight of scale are rounded
    to eight, by at most 2^-9 relative.
    """
    values = _buffer(weight, torch.bfloat16, out)
    expand_launch(weight, format, values, None).run()
    return values


def expand_to_int8(
    weight: WeightTensors, format: Format, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand a weight for INT8 tensor cores: codes (out, in) int8, into `out` if given, and scales
    (out, groups) float32.

    Raises UnsupportedError for formats whose levels are not their codes.
    """
    check_int8(format)
    values = _buffer(weight, torch.int8, out)
    expand_launch(weight, format, values, None).run()
    return values, scale_from_bytes(weight.scale, format)


def _buffer(weight: WeightTensors, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    num_rows, half = weight.packed.shape
    if out is None:
        return torch.empty(num_rows, 2 * half, dtype=dtype, device=weight.packed.device)
    if out.shape != (num_rows, 2 * half) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"a weight of {num_rows} × {2 * half} in {dtype} does not fit into {out.shape}, {out.dtype}.")
    return out


def specializations() -> NamedLaunches:
    """Return the launches of Wan's linears; the compiler treats 5120 and 13,824 features alike."""
    num_rows, in_features = 5120, 5120

    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for format in FORMATS.values():
        num_bytes = format.num_groups(in_features) * format.scale_grid.num_bytes
        weight = WeightTensors(
            packed=meta(num_rows, in_features // 2, dtype=torch.uint8),
            scale=meta(num_rows, num_bytes, dtype=torch.uint8),
            tensor_scale=meta(dtype=torch.float32) if format.has_tensor_scale else None,
        )
        for dtype in dtypes_of(format):
            values = meta(num_rows, in_features, dtype=dtype)
            row_scale = meta(num_rows, dtype=torch.float32) if dtype == torch.float8_e4m3fn else None
            yield f"{OUTPUTS[dtype]} {format.name}", expand_launch(weight, format, values, row_scale)
