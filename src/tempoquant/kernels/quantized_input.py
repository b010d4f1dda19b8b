"""QuantizedInput: what the kernels of one backend make of a linear's input, and multiply afterwards."""

from typing import NamedTuple

import torch


class QuantizedInput(NamedTuple):
    """The input of linears that share it, quantized once.

    Attributes:
        values: (tokens, in): float8_e4m3fn (backend fp8), bfloat16 (bf16) or int8 (int8); packed codes, (tokens,
            in / 2) uint8 (fp4).
        scale: fp8: (tokens,) float32, a power of two a row, and the numbers are values · scale[row]; int8: (tokens,
            groups) float32; fp4: (tokens, groups) as a weight's scales are stored, float8_e4m3fn or uint8; bf16: None,
            the values are the numbers. A row with NaN or infinity has NaN scales, and any values.
        hidden: (tokens, rank) bfloat16, x · downᵀ, which the branch goes on with; None without a branch.
        outside: fp8 in MXFP4 only: (tokens,) bool, rows whose group scales do not fit FP8's window. Their values are
            bytes of codes and scales, which `triton_outside.replace_outside_rows` multiplies.
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    hidden: torch.Tensor | None
    outside: torch.Tensor | None
