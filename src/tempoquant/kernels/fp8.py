"""The backend fp8: four-bit numbers in FP8 bytes, exactly, and one FP8 product a linear (Hopper, Ada, Blackwell)."""

import torch

from tempoquant.formats import Format
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_expand import expand_to_fp8
from tempoquant.kernels.triton_fp8_gemm import fp8_multiply
from tempoquant.kernels.triton_outside import replace_outside_rows
from tempoquant.kernels.triton_quantize import quantize_to_fp8 as quantize_input

__all__ = ["multiply", "quantize_input"]


def multiply(quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """The rest of a linear: (tokens, out) in `dtype`. The expanded weight lives as long as the product.

    The allocator gives its memory to the next linear, so one buffer of the largest weight serves a whole model, inside
    a CUDA graph as well.
    """
    values, row_scale = expand_to_fp8(weight, format)
    y = fp8_multiply(quantized, values, row_scale, weight.up, weight.bias, dtype)
    if quantized.outside is None:
        return y
    return replace_outside_rows(y, quantized, values, row_scale, weight.up, weight.bias)
