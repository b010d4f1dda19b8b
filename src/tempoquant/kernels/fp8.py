"""The backend fp8: four-bit numbers in FP8 bytes, exactly, and one FP8 product a linear (Ada,
Hopper).

    y = (values · weightᵀ) · scale[token] · row_scale[output] + hidden · upᵀ + bias

The branch and the bias stay in float32, and y is rounded once.
`benchmarks.vendor_products.fp8_scaled_mm` computes the same by the vendor's library, with one more
rounding.
"""

import torch

from tempoquant.formats import Format
from tempoquant.kernels.launch import NamedLaunches
from tempoquant.kernels.quantize_to import quantize_to_fp8 as quantize_input
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_expand import expand_to_fp8
from tempoquant.kernels.triton_gemm import Product, Tile, Tiles, wan_launches
from tempoquant.kernels.triton_gemm import multiply as multiply_product
from tempoquant.kernels.triton_outside import replace_outside_rows

__all__ = ["fp8_multiply", "multiply", "quantize_input"]

# Hopper's first tile fills its registers: two halves of 64 sums a thread, and room for 64 more
# where sums are promoted. Ada and RTX have 99 KiB of shared memory.
TILES: Tiles = {
    89: (Tile(128, 64, 128, 8, 3), Tile(64, 32, 64, 4, 4)),
    90: (Tile(128, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4)),
    100: (Tile(128, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4)),
    120: (Tile(128, 64, 128, 8, 3), Tile(64, 32, 64, 4, 4)),
}


def multiply(quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """Compute the product of a linear with branch and bias: (tokens, out) in `dtype`. The expanded
    weight lives as long as the product.

    The allocator reuses its memory for the next linear, so one buffer of the largest weight serves
    a whole model, also inside a CUDA graph.
    """
    values, row_scale = expand_to_fp8(weight, format)
    y = fp8_multiply(quantized, values, row_scale, weight.up, weight.bias, dtype)
    if quantized.outside is None:
        return y
    return replace_outside_rows(y, quantized, values, row_scale, weight.up, weight.bias)


def fp8_multiply(
    quantized: QuantizedInput,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute one linear.

    Args:
        quantized: values float8_e4m3fn or float8_e5m2, with the scale of each row.
        weight: (out, in) float8_e4m3fn. row_scale: (out,) float32.
        up: (out, rank) bfloat16, or None. bias: (out,), or None.
        dtype: of the result.

    Returns:
        (tokens, out).
    """
    product = Product(quantized.values, weight, quantized.scale, row_scale, quantized.hidden, up, bias)
    return multiply_product(product, dtype, TILES)


def specializations() -> NamedLaunches:
    """Return the launches of Wan2.2."""
    return wan_launches(torch.float8_e4m3fn, TILES)
