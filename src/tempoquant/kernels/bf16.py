"""The backend bf16: the same numbers in bfloat16, for formats and GPUs that FP8, FP4 and INT8 do
not serve.

    y = (values · weightᵀ) · tensor_scale + hidden · upᵀ + bias

Operands are exact except INT4's, whose levels times bfloat16 scales are rounded by at most 2^-9
relative. The tensor scale stays on the device and is applied to float32 sums, so that the operands
stay exact and y is rounded once. `benchmarks.vendor_products.bf16_linear` computes the same by the
vendor's library, with two more roundings.
"""

import torch

from tempoquant.formats import Format
from tempoquant.kernels.launch import NamedLaunches
from tempoquant.kernels.quantize_to import quantize_to_bf16 as quantize_input
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_expand import expand_to_bf16
from tempoquant.kernels.triton_gemm import Product, Tile, Tiles, wan_launches
from tempoquant.kernels.triton_gemm import multiply as multiply_product

__all__ = ["bf16_multiply", "multiply", "quantize_input"]

# Sizes in bytes as in `fp8`.
TILES: Tiles = {
    80: (Tile(128, 64, 64, 8, 4), Tile(64, 32, 64, 4, 4)),
    86: (Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 3)),
    90: (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    100: (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    120: (Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 3)),
}


def multiply(quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """Compute the product of a linear with branch and bias: (tokens, out) in `dtype`. The expanded
    weight lives as long as the product.
    """
    values = expand_to_bf16(weight, format)
    return bf16_multiply(quantized, values, weight.tensor_scale, weight.up, weight.bias, dtype)


def bf16_multiply(
    quantized: QuantizedInput,
    weight: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute one linear.

    Args:
        quantized: values bfloat16, without a scale.
        weight: (out, in) bfloat16. tensor_scale: () float32, or None for 1.
        up: (out, rank) bfloat16, or None. bias: (out,), or None.
        dtype: of the result.

    Returns:
        (tokens, out).
    """
    column_scale = None if tensor_scale is None else tensor_scale.expand(len(weight))
    product = Product(quantized.values, weight, None, column_scale, quantized.hidden, up, bias)
    return multiply_product(product, dtype, TILES)


def specializations() -> NamedLaunches:
    """Return the launches of Wan2.2."""
    return wan_launches(torch.bfloat16, TILES)
