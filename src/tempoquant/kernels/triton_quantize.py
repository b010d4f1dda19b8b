"""The input of a 4-bit linear, rounded to what tensor cores read: one Triton kernel for FP8, BF16 and INT8.

    z = H(x / smoothing_factor) − hidden · deflationᵀ − input_offset     float32; H rotates, where the layer does
    values, scale = Q(z)                                                 see `formats.quantize_activation`

A program rounds a few tokens, a piece of the features at a time. Where a number depends on its whole row (the base of
FP8, the octave window of NVFP4 with one mantissa bit, 8-bit rows) it first walks over the row for its largest number.
Bytes a number, for 16-bit x: 2 in, 2 more from the L2 cache where there are two walks, and 1 (FP8, INT8) or 2 (BF16)
out. With deflation a program takes 64 tokens, and each walk reads rank / 32 bytes a number from L2. That is few bytes
for the instructions (57 a number in the two loops of NVFP4 with one mantissa bit, rank 32, compiled for Hopper): z is
computed in both walks, and every candidate of a scale rounds every number. So divisions are multiplications by
reciprocals that round as IEEE's division does, and threads hold whole groups.

Rows of 8 bits (W4A8) hold what `formats.eight_bits` says: E4M3 numbers times a power of two of their row, which FP8 and
BF16 both hold exactly, or beside INT4 weights integers. In INT8 the scale of the row stands for each group.
"""

import torch
import triton

from tempoquant.formats import FORMATS, Format, ScaleRule
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.fp8_window import check_fp8, check_int8, dtypes_of
from tempoquant.kernels.launch import NATIVE_FP8, Launch, NamedLaunches, dense, with_rows
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.triton_quantize_kernel import quantize_kernel
from tempoquant.kernels.triton_quantize_outside import quantize_outside_launch
from tempoquant.kernels.triton_rounding import rounding_of

OUTPUTS = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.int8: "int8"}


def quantize_launch(
    x: torch.Tensor,
    transform: InputTransform,
    format: Format,
    rule: ScaleRule,
    clip_ratio: torch.Tensor,
    eight_bits: torch.Tensor | bool | None,
    result: QuantizedInput,
) -> Launch:
    """The launch that rounds x, with `result.hidden`, into `result`; the dtype of its values says for which backend."""
    num_tokens, in_features = x.shape
    x = with_rows(x)
    factor = dense(transform.smoothing_factor)
    output = OUTPUTS[result.values.dtype]
    hidden = with_rows(result.hidden)
    deflation = None if hidden is None else dense(transform.deflation)
    flags = dense(eight_bits) if isinstance(eight_bits, torch.Tensor) else None
    rank = 0 if deflation is None else deflation.shape[1]
    block_rows, block_columns, num_warps = _block(rank)
    return Launch(
        quantize_kernel,
        (triton.cdiv(num_tokens, block_rows),),
        {
            "x": x,
            "hidden": hidden,
            "smoothing_factor": factor,
            "reciprocal_factor": None if factor is None else factor.float().reciprocal(),
            "deflation": deflation,
            "input_offset": dense(transform.input_offset),
            "clip_ratio": dense(clip_ratio),
            "eight_bits": flags,
            "values": result.values,
            "scale": result.scale,
            "outside": result.outside,
            "num_tokens": num_tokens,
            "IN_FEATURES": in_features,
            "rank": rank,
            "x_row_stride": x.stride(0),
            "hidden_row_stride": 0 if hidden is None else hidden.stride(0),
            "rows_per_clip_ratio": _rows_per_entry(num_tokens, clip_ratio),
            "rows_per_flag": 1 if flags is None else _rows_per_entry(num_tokens, flags),
            "FORMAT": rounding_of(format, rule),
            "OUTPUT": output,
            "ROTATED": transform.rotated,
            "ALL_EIGHT_BITS": eight_bits is True,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns,
            "HALF_RANK": max(32, triton.next_power_of_2(rank)) // 2,
        },
        {"num_warps": num_warps, "enable_fp_fusion": False},
        NATIVE_FP8 if output == "fp8" else 80,
    )


def empty_result(x: torch.Tensor, hidden: torch.Tensor | None, format: Format, dtype: torch.dtype) -> QuantizedInput:
    """A QuantizedInput to write to, whose values have this dtype."""
    num_tokens, in_features = x.shape

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    scale, outside = None, None
    if dtype == torch.float8_e4m3fn:
        scale = empty(num_tokens, dtype=torch.float32)
        outside = empty(num_tokens, dtype=torch.bool) if format.scale_octaves is None else None
    elif dtype == torch.int8:
        scale = empty(num_tokens, format.num_groups(in_features), dtype=torch.float32)
    return QuantizedInput(empty(num_tokens, in_features, dtype=dtype), scale, hidden, outside)


def _block(rank: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program.

    64 rows with a warp to every 16 are the smallest product that Hopper's tensor cores take, and 64 columns make 32
    numbers a thread, which fit into registers with their candidates. Without a branch rows share nothing.
    """
    return (16, 128, 4) if rank == 0 else (64, 64, 4)


def _rows_per_entry(num_tokens: int, entries: torch.Tensor) -> int:
    if entries.dim() != 1 or num_tokens % entries.shape[0]:
        raise ValueError(f"{num_tokens} tokens are not as many for each of {tuple(entries.shape)} batch entries.")
    return max(1, num_tokens // entries.shape[0])


def quantize_to_fp8(
    x: torch.Tensor,
    hidden: torch.Tensor | None,
    transform: InputTransform,
    format: Format,
    rule: ScaleRule,
    clip_ratio: torch.Tensor,
    eight_bits: torch.Tensor | bool | None = None,
) -> QuantizedInput:
    """The input of a linear for FP8 tensor cores: `values · scale[:, None]` is what the reference multiplies.

    Args:
        x: (tokens, in), bfloat16, float16 or float32; read where it lies if features lie side by side.
        hidden: (tokens, rank) bfloat16, x · downᵀ; None without a branch.
        clip_ratio: (batches,) float32 on the device; token t has that of batch t // (tokens / batches).
        eight_bits: which batches round to 8 bits, (batches,) bool on the device; True for all; None for none.

    Returns:
        exact numbers. Rows of MXFP4 whose scales span more than 15 octaves hold codes and scales instead, and `outside`
        says so: see `triton_outside`. A row that holds NaN or infinity is zeros with the scale NaN.

    Raises UnsupportedError for NVFP4 and INT4, which FP8 does not hold.
    """
    check_fp8(format)
    result = empty_result(x, hidden, format, torch.float8_e4m3fn)
    launch = quantize_launch(x, transform, format, rule, clip_ratio, eight_bits, result)
    launch.run()
    if result.outside is not None:
        quantize_outside_launch(launch).run()
    return result


def quantize_to_bf16(
    x: torch.Tensor,
    hidden: torch.Tensor | None,
    transform: InputTransform,
    format: Format,
    rule: ScaleRule,
    clip_ratio: torch.Tensor,
    eight_bits: torch.Tensor | bool | None = None,
) -> QuantizedInput:
    """The same for BF16 tensor cores: values are level times scale, exact but for INT4 (2^-9 relative)."""
    result = empty_result(x, hidden, format, torch.bfloat16)
    quantize_launch(x, transform, format, rule, clip_ratio, eight_bits, result).run()
    return result


def quantize_to_int8(
    x: torch.Tensor,
    hidden: torch.Tensor | None,
    transform: InputTransform,
    format: Format,
    rule: ScaleRule,
    clip_ratio: torch.Tensor,
    eight_bits: torch.Tensor | bool | None = None,
) -> QuantizedInput:
    """The same for INT8 tensor cores: values are INT4's codes, and `scale` (tokens, groups) float32 is each group's.

    Raises UnsupportedError for formats whose levels are not their codes.
    """
    check_int8(format)
    result = empty_result(x, hidden, format, torch.int8)
    quantize_launch(x, transform, format, rule, clip_ratio, eight_bits, result).run()
    return result


def specializations() -> NamedLaunches:
    """Wan's inputs by the default rule: without a branch, and with one, also where some rows have 8 bits."""
    num_tokens, in_features = 32760, 5120

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    flags = meta(2, dtype=torch.bool)
    cases = ((0, "4", None), (32, "4", None), (128, "4 or 8", flags))
    for format in FORMATS.values():
        for dtype in dtypes_of(format):
            for rank, bits, eight_bits in cases:
                x, factor, offset = meta(num_tokens, in_features), meta(in_features), meta(in_features)
                deflation = meta(in_features, rank) if rank else None
                transform = InputTransform(
                    smoothing_factor=factor, rotated=rank > 0, deflation=deflation, input_offset=offset
                )
                result = empty_result(x, meta(num_tokens, rank) if rank else None, format, dtype)
                ratio = meta(2, dtype=torch.float32)
                launch = quantize_launch(x, transform, format, ScaleRule.LEAST_ERROR, ratio, eight_bits, result)
                name = f"{OUTPUTS[dtype]} {format.name}, rank {rank}, {bits} bits"
                yield name, launch
                if result.outside is not None:
                    yield f"outside rows of {name}", quantize_outside_launch(launch)
