"""QuantizedInput: a linear's input as one backend's kernels quantize it, and multiply it
afterwards.
"""

from typing import NamedTuple

import torch

from tempoquant.formats import Format


class QuantizedInput(NamedTuple):
    """The input of linears that share it, quantized once.

    Attributes:
        values: (tokens, in): float8_e4m3fn (backend fp8), bfloat16 (bf16) or int8 (int8); packed
            codes, (tokens, in / 2) uint8 (fp4).
        scale: fp8: (tokens,) float32, a power of two a row, and the numbers are values ·
            scale[row]; int8: (tokens, groups) float32; fp4: (tokens, groups) as a weight's scales
            are stored, float8_e4m3fn or uint8; bf16: None, the values are the numbers. A row with
            NaN or infinity has NaN scales, and any values.
        hidden: (tokens, rank) bfloat16, x · downᵀ, the input of the branch's up; None without a
            branch.
        outside: fp8 in MXFP4 only: (tokens,) bool, rows whose group scales do not fit FP8's window.
            Their values are bytes of codes and scales, which `triton_outside.replace_outside_rows`
            multiplies.
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    hidden: torch.Tensor | None
    outside: torch.Tensor | None


def empty_result(x: torch.Tensor, hidden: torch.Tensor | None, format: Format, dtype: torch.dtype) -> QuantizedInput:
    """Allocate a QuantizedInput to write to, whose values have this dtype."""
    num_tokens, in_features = x.shape

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    scale, outside = None, None
    if dtype == torch.float8_e4m3fn:
        scale = empty(num_tokens, dtype=torch.float32)
        outside = empty(num_tokens, dtype=torch.bool) if format.scale_octaves is None else None
    elif dtype == torch.int8:
        scale = empty(num_tokens, format.num_groups(in_features), dtype=torch.float32)
    elif dtype == torch.uint8:
        scale = empty(num_tokens, format.num_groups(in_features), dtype=fp4_scale_dtype(format))
        in_features //= 2
    return QuantizedInput(empty(num_tokens, in_features, dtype=dtype), scale, hidden, outside)


def fp4_scale_dtype(format: Format) -> torch.dtype:
    """Return the storage dtype of packed codes' scales: float8_e4m3fn for NVFP4, bytes of exponents
    for MXFP4.
    """
    return torch.float8_e4m3fn if format.scale_grid.is_e4m3 else torch.uint8
