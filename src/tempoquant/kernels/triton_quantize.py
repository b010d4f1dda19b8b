"""The launches that round a linear's input to tensor-core operands, by one kernel.

    z = H(x / smoothing_factor) − hidden · deflationᵀ − input_offset        float32; H is optional
    values, scale = Q(z)                    as `formats.quantize_activation`

A program rounds a few tokens, a piece of the features at a time. Rows of 8 bits need their largest
number first, and so does an unusual row of 4 bits (`triton_quantize_kernel`): these take two
passes. Bytes a number, for 16-bit x: 2 in, 2 more from the L2 cache with two passes, and 1/2 (FP4),
1 (FP8, INT8) or 2 (BF16) out. With deflation a pass reads rank / (half of the program's rows) bytes
a number from L2. That is few bytes for the instructions, which docs/kernels.md counts. So divisions
are multiplications by reciprocals that round as IEEE's division does, and threads hold whole
groups.

Rows of 8 bits (W4A8) hold the numbers of `formats.eight_bits`: E4M3 numbers times a power of two of
their row, which FP8 and BF16 both hold exactly, or beside INT4 weights integers. In INT8 the scale
of the row counts for each group.
"""

import torch
import triton

from tempoquant.formats import FORMATS, Format, ScaleRule
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.fp8_window import dtypes_of
from tempoquant.kernels.launch import NATIVE_FP4, NATIVE_FP8, Launch, NamedLaunches, dense, with_rows
from tempoquant.kernels.quantized_input import QuantizedInput, empty_result
from tempoquant.kernels.triton_gemm import capability_of
from tempoquant.kernels.triton_quantize_input import NARROW, InputSteps, columns_kernel
from tempoquant.kernels.triton_quantize_kernel import quantize_kernel
from tempoquant.kernels.triton_quantize_outside import quantize_outside_launch
from tempoquant.kernels.triton_scales import rounding_of

OUTPUTS = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.int8: "int8", torch.uint8: "fp4"}


def quantize_launch(  # noqa: PLR0913
    x: torch.Tensor,
    columns: torch.Tensor | None,
    transform: InputTransform,
    format: Format,
    rule: ScaleRule,
    clip_ratio: torch.Tensor,
    eight_bits: torch.Tensor | bool | None,
    result: QuantizedInput,
    capability: int | None = None,
) -> Launch:
    """Return the launch that rounds x, with `result.hidden`, into `result`; the dtype of its values
    selects the backend.

    columns: filled by `columns_launch` for the same format and rule. capability: 90 for 9.0; None
    for the device's.
    """
    num_tokens, in_features = x.shape
    x = with_rows(x)
    output = OUTPUTS[result.values.dtype]
    hidden = with_rows(result.hidden)
    deflation = None if hidden is None else dense(transform.deflation)
    flags = dense(eight_bits) if isinstance(eight_bits, torch.Tensor) else None
    rank = 0 if deflation is None else deflation.shape[1]
    capability = capability_of(x.device) if capability is None else capability
    # Wide tiles hold the whole rank twice: of a large one, registers and shared memory do not.
    is_wide = eight_bits is None and rank <= 32
    block_rows, block_columns, num_warps = _block(rank, format.group_size if is_wide else 16, capability)
    return Launch(
        quantize_kernel,
        (triton.cdiv(num_tokens, block_rows),),
        {
            "x": x,
            "hidden": hidden,
            "columns": columns,
            "deflation": deflation,
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
            "HAS": steps_of(transform),
            "ALL_EIGHT_BITS": eight_bits is True,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns,
            "PRODUCT_RANK": _product_rank(rank, block_columns),
        },
        {"num_warps": num_warps, "enable_fp_fusion": False},
        {"fp8": NATIVE_FP8, "fp4": NATIVE_FP4}.get(output, 80),
    )


def columns_launch(transform: InputTransform, format: Format, rule: ScaleRule, columns: torch.Tensor) -> Launch:
    """Return the launch that fills columns (3, in) float32 with the rounding kernel's data of each
    feature.
    """
    in_features = columns.shape[1]
    return Launch(
        columns_kernel,
        (triton.cdiv(in_features, 1024),),
        {
            "smoothing_factor": dense(transform.smoothing_factor),
            "input_offset": dense(transform.input_offset),
            "columns": columns,
            "num_features": in_features,
            "FORMAT": rounding_of(format, rule),
            "HAS": steps_of(transform),
            "BLOCK": 1024,
        },
        {"num_warps": 4, "enable_fp_fusion": False},
    )


def steps_of(transform: InputTransform) -> InputSteps:
    """Return the steps that the kernel takes beside deflation."""
    present = (each is not None for each in (transform.input_offset, transform.deflation))
    return InputSteps(transform.smoothing_factor is not None, transform.rotated, *present)


def _block(rank: int, group_size: int, capability: int) -> tuple[int, int, int]:
    """Return rows, columns and warps of a program.

    64 rows with a warp to every 16 are the smallest product that Hopper's tensor cores take, and 64
    columns make 32 numbers a thread, which fit into registers with their candidates. Tensor cores
    of Blackwell's data centre GPUs sum in their own memory; for a single warp the compiler takes
    the older instructions, which sum in registers. With groups wider than 16 a thread has one
    group, and a warp eight rows (`triton_quantize_input._deflated`). Without a branch rows share
    nothing.
    """
    if rank == 0:
        return 16, 128, 4
    num_warps = 1 if capability // 10 == 10 else max(4, group_size // 8)
    return (16 * num_warps, 64, num_warps) if group_size == 16 else (8 * num_warps, 4 * group_size, num_warps)


def _product_rank(rank: int, block_columns: int) -> int:
    """Return the rank of each of the two products that subtract the branch: half of it, or all."""
    whole = max(16, triton.next_power_of_2(rank))
    return max(16, whole // 2) if block_columns == NARROW else whole


def _rows_per_entry(num_tokens: int, entries: torch.Tensor) -> int:
    if entries.dim() != 1 or num_tokens % entries.shape[0]:
        raise ValueError(f"{num_tokens} tokens are not as many for each of {tuple(entries.shape)} batch entries.")
    return max(1, num_tokens // entries.shape[0])


def specializations() -> NamedLaunches:
    """Return the launches of Wan's inputs by the default rule: without and with a branch, also with
    all or some rows in 8 bits.
    """
    for format in FORMATS.values():
        for dtype in dtypes_of(format) + ([] if format.has_integer_levels else [torch.uint8]):
            for rank, bits in ((0, "4"), (32, "4"), (32, "8"), (128, "4 or 8")):
                if dtype == torch.uint8 and bits != "4":
                    continue
                for capability, newest in ((80, 99), (100, 109), (110, 999)):
                    launch = _wan_launch(format, dtype, rank, bits, capability)
                    first = max(capability, launch.min_capability)
                    if first > newest:
                        continue
                    launch = launch._replace(min_capability=first, max_capability=newest)
                    name = f"{OUTPUTS[dtype]} {format.name}, rank {rank}, {bits} bits, cc {capability}"
                    yield name, launch
                    if launch.arguments["outside"] is not None:
                        yield f"outside rows of {name}", quantize_outside_launch(launch)


def _wan_launch(format: Format, dtype: torch.dtype, rank: int, bits: str, capability: int) -> Launch:
    num_tokens, in_features = 32760, 5120

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, columns = meta(num_tokens, in_features), meta(3, in_features, dtype=torch.float32)
    transform = InputTransform(
        smoothing_factor=meta(in_features), rotated=rank > 0, deflation=meta(in_features, rank) if rank else None,
        input_offset=meta(in_features),
    )  # fmt: skip
    result = empty_result(x, meta(num_tokens, rank) if rank else None, format, dtype)
    ratio, eight_bits = meta(2, dtype=torch.float32), {"4": None, "8": True, "4 or 8": meta(2, dtype=torch.bool)}[bits]
    return quantize_launch(
        x, columns, transform, format, ScaleRule.LEAST_ERROR, ratio, eight_bits, result, capability
    )  # fmt: skip
