"""The backend bf16: the same numbers in bfloat16, for formats and GPUs that FP8 and INT8 do not serve.

Operands are exact but for INT4's, whose levels times bfloat16 scales are rounded by at most 2^-9 relative.
"""

import torch

from tempoquant.formats import Format
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_bf16_gemm import bf16_multiply
from tempoquant.kernels.triton_expand import expand_to_bf16
from tempoquant.kernels.triton_quantize import quantize_to_bf16 as quantize_input

__all__ = ["multiply", "quantize_input"]


def multiply(quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """The rest of a linear: (tokens, out) in `dtype`. The expanded weight lives as long as the product."""
    values = expand_to_bf16(weight, format)
    return bf16_multiply(quantized, values, weight.tensor_scale, weight.up, weight.bias, dtype)
