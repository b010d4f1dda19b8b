"""The backend int8: INT4 codes on integer tensor cores, group sums rescaled in float32 (Ampere and up)."""

import torch

from tempoquant.formats import Format
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_expand import expand_to_int8
from tempoquant.kernels.triton_int8_gemm import int8_multiply
from tempoquant.kernels.triton_quantize import quantize_to_int8 as quantize_input

__all__ = ["multiply", "quantize_input"]


def multiply(quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """The rest of a linear: (tokens, out) in `dtype`. The expanded codes live as long as the product."""
    codes, scale = expand_to_int8(weight, format)
    return int8_multiply(quantized, codes, scale, weight.up, weight.bias, dtype)
