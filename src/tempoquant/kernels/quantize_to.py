"""The input of a 4-bit linear, rounded to what the tensor cores of one backend read."""

import functools

import torch

from tempoquant.errors import UnsupportedError
from tempoquant.formats import Format, ScaleRule
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.fp8_window import check_fp4, check_fp8, check_int8
from tempoquant.kernels.quantized_input import QuantizedInput, empty_result
from tempoquant.kernels.triton_quantize import columns_launch, quantize_launch
from tempoquant.kernels.triton_quantize_outside import quantize_outside_launch

_CHECKS = {torch.float8_e4m3fn: check_fp8, torch.int8: check_int8, torch.uint8: check_fp4}


def quantize_to(
    dtype: torch.dtype,
    x: torch.Tensor,
    hidden: torch.Tensor | None,
    transform: InputTransform,
    format: Format,
    rule: ScaleRule,
    clip_ratio: torch.Tensor,
    eight_bits: torch.Tensor | bool | None = None,
) -> QuantizedInput:
    """Round x, less its branch, to values of that dtype.

    Args:
        dtype: float8_e4m3fn: `values · scale[:, None]` is what the reference multiplies, exactly.
            Rows of MXFP4 whose scales span more than 15 octaves hold codes and scales instead, and
            `outside` says so: see `triton_outside`. A row that holds NaN or infinity is zeros with
            the scale NaN. bfloat16: values are level times scale, exact but for INT4 (2^-9
            relative). int8: values are INT4's codes, and `scale` (tokens, groups) float32 is each
            group's. uint8: packed codes (tokens, in / 2) and scales (tokens, groups), as weights
            are stored.
        x: (tokens, in), bfloat16, float16 or float32; read where it lies if features lie side by
            side.
        hidden: (tokens, rank) bfloat16, x · downᵀ; None without a branch.
        clip_ratio: (batches,) float32 on the device; token t has that of batch t // (tokens /
            batches).
        eight_bits: which batches round to 8 bits, (batches,) bool on the device; True for all; None
            for none.

    Raises UnsupportedError for a format that such values do not hold, and where some tokens of
    uint8 have eight bits.
    """
    if dtype in _CHECKS:
        _CHECKS[dtype](format)
    if dtype == torch.uint8 and eight_bits is not None:
        raise UnsupportedError("FP4 does not hold activations of eight bits: take the backend fp8 or bf16 for them.")
    result = empty_result(x, hidden, format, dtype)
    columns = None
    if transform.smoothing_factor is not None or transform.input_offset is not None:
        columns = torch.empty(3, x.shape[1], dtype=torch.float32, device=x.device)
        columns_launch(transform, format, rule, columns).run()
    launch = quantize_launch(x, columns, transform, format, rule, clip_ratio, eight_bits, result)
    launch.run()
    if result.outside is not None:
        quantize_outside_launch(launch).run()
    return result


quantize_to_fp4 = functools.partial(quantize_to, torch.uint8)
quantize_to_fp8 = functools.partial(quantize_to, torch.float8_e4m3fn)
quantize_to_bf16 = functools.partial(quantize_to, torch.bfloat16)
quantize_to_int8 = functools.partial(quantize_to, torch.int8)
