"""The product of the backend fp8: four-bit operands that FP8 holds exactly, at the speed of FP8 tensor cores.

    y = (values · weightᵀ) · scale[token] · row_scale[output] + hidden · upᵀ + bias

Ours keeps the branch and the bias in float32 and rounds y once. `benchmarks.vendor_products.fp8_scaled_mm` is
the same by the vendor's library, with one rounding more.
"""

import torch

from tempoquant.kernels.launch import NamedLaunches
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.triton_gemm import Product, Tile, Tiles, multiply, wan_launches

# Hopper's first tile fills its registers: two halves of 64 sums a thread, and 64 more for a sum apart. Ada and RTX have
# 99 KiB of shared memory.
TILES: Tiles = {
    89: (Tile(128, 64, 128, 8, 3), Tile(64, 32, 64, 4, 4)),
    90: (Tile(128, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4)),
    100: (Tile(128, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4)),
    120: (Tile(128, 64, 128, 8, 3), Tile(64, 32, 64, 4, 4)),
}


def fp8_multiply(
    quantized: QuantizedInput,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One linear.

    Args:
        quantized: values float8_e4m3fn or float8_e5m2, with the scale of each row.
        weight: (out, in) float8_e4m3fn. row_scale: (out,) float32.
        up: (out, rank) bfloat16, or None. bias: (out,), or None.
        dtype: of the result.

    Returns:
        (tokens, out).
    """
    product = Product(quantized.values, weight, quantized.scale, row_scale, quantized.hidden, up, bias)
    return multiply(product, dtype, TILES)


def specializations() -> NamedLaunches:
    """What Wan2.2 launches."""
    return wan_launches(torch.float8_e4m3fn, TILES)
