"""The product of the backend bf16: four-bit operands as bfloat16, for formats and devices that FP8 does not serve.

    y = (values · weightᵀ) · tensor_scale + hidden · upᵀ + bias

The tensor scale stays on the device and is applied to float32 sums, so that the operands stay exact and y is rounded
once. `benchmarks.vendor_products.bf16_linear` is the same by the vendor's library, with two roundings more.
"""

import torch

from tempoquant.kernels.launch import NamedLaunches
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.triton_gemm import Product, Tile, Tiles, multiply, wan_launches

# Sizes in bytes as in triton_fp8_gemm.
TILES: Tiles = {
    80: (Tile(128, 64, 64, 8, 4), Tile(64, 32, 64, 4, 4)),
    86: (Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 3)),
    90: (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    100: (Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    120: (Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 3)),
}


def bf16_multiply(
    quantized: QuantizedInput,
    weight: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One linear.

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
    return multiply(product, dtype, TILES)


def specializations() -> NamedLaunches:
    """What Wan2.2 launches."""
    return wan_launches(torch.bfloat16, TILES)
