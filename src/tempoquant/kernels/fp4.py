"""The backend fp4: codes and scales multiplied as they are stored, by Blackwell's four-bit tensor
cores.

    y = (values · weightᵀ, each group times both scales) · tensor_scale + hidden · upᵀ + bias

Nothing is expanded: the weight is read as the checkpoint holds it, and the input is packed in the
same way. Operands and products are exact, sums are float32, and y is rounded once. Rows of eight
bits are no codes: `operators` gives linears with such rows to another backend.
"""

import torch
import triton

from tempoquant.formats import FORMATS, Format
from tempoquant.kernels.launch import NATIVE_FP4, Launch, NamedLaunches, dense, with_rows
from tempoquant.kernels.quantize_to import quantize_to_fp4 as quantize_input
from tempoquant.kernels.quantized_input import QuantizedInput, fp4_scale_dtype
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_gemm import (
    Tile,
    Tiles,
    capability_of,
    is_interpreted,
    new_output,
    newest_served,
    tile_for,
)
from tempoquant.kernels.triton_scaled_gemm import scaled_gemm_kernel
from tempoquant.kernels.triton_tile import ROWS_AT_ONCE, rank_blocks

# A tile is (tokens, outputs) here; `inner` counts numbers, two a byte.
TILES: Tiles = {
    100: (Tile(128, 256, 256, 8, 3), Tile(128, 64, 256, 4, 4)),
    120: (Tile(128, 128, 256, 8, 2), Tile(64, 64, 256, 4, 3)),
}


__all__ = ["fp4_multiply", "multiply", "quantize_input"]


def multiply(quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """Compute the product of a linear with branch and bias: (tokens, out) in `dtype`. Nothing is
    expanded.
    """
    return fp4_multiply(quantized, weight, format, dtype)


def fp4_multiply(quantized: QuantizedInput, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """Compute one linear.

    Args:
        quantized: packed codes (tokens, in / 2) and scales (tokens, groups).
        weight: as a checkpoint stores it.
        dtype: of the result.

    Returns:
        (tokens, out).
    """
    y = new_output(quantized.values, len(weight.packed), dtype)
    tile = tile_for(TILES, len(quantized.values), capability_of(quantized.values.device))
    fp4_launch(quantized, weight, format, y, tile).run()
    return y.to(dtype)


def fp4_launch(quantized: QuantizedInput, weight: WeightTensors, format: Format, y: torch.Tensor, tile: Tile) -> Launch:
    """Return the launch that fills y (tokens, out), of any float dtype."""
    values, packed, bias = with_rows(quantized.values), with_rows(weight.packed), dense(weight.bias)
    assert quantized.scale is not None
    scale, weight_scale = with_rows(quantized.scale), with_rows(weight.scale).view(fp4_scale_dtype(format))
    hidden, up = with_rows(quantized.hidden), with_rows(weight.up)
    rank = 0 if up is None else up.shape[1]
    if rank == 0:
        hidden = up = None
    return Launch(
        scaled_gemm_kernel,
        (triton.cdiv(len(values), tile.tokens) * triton.cdiv(len(packed), tile.outputs),),
        {
            "values": values, "scale": scale, "weight": packed, "weight_scale": weight_scale, "y": y,
            "column_scale": weight.tensor_scale, "hidden": hidden, "up": up, "bias": bias,
            "num_tokens": len(values), "num_outputs": len(packed), "rank": rank,
            "values_stride": values.stride(0), "scale_stride": scale.stride(0), "weight_stride": packed.stride(0),
            "weight_scale_stride": weight_scale.stride(0), "y_stride": y.stride(0),
            "hidden_stride": 0 if hidden is None else hidden.stride(0), "up_stride": 0 if up is None else up.stride(0),
            "NUM_INNER": 2 * values.shape[1], "GROUP": format.group_size, "GRID": format.scale_grid.value,
            "UPCAST": is_interpreted(), "TOKENS": tile.tokens, "OUTPUTS": tile.outputs, "INNER": tile.inner,
            **rank_blocks(rank), "ROWS_AT_ONCE": ROWS_AT_ONCE,
        },
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        NATIVE_FP4,
    )  # fmt: skip


def specializations() -> NamedLaunches:
    """Return the launches of Wan2.2."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for format in FORMATS.values():
        if format.has_integer_levels:
            continue
        for capability, (many, few) in TILES.items():
            for tile, num_tokens in ((many, 32_760), (few, 1)):
                groups = 5120 // format.group_size
                scale = meta(num_tokens, groups, dtype=fp4_scale_dtype(format))
                quantized = QuantizedInput(meta(num_tokens, 2560, dtype=torch.uint8), scale, meta(num_tokens, 32), None)
                tensor_scale = meta(dtype=torch.float32) if format.has_tensor_scale else None
                weight = WeightTensors(meta(5120, 2560, dtype=torch.uint8), meta(5120, groups, dtype=torch.uint8),
                                       tensor_scale, meta(5120, 32), meta(5120))  # fmt: skip
                launch = fp4_launch(quantized, weight, format, meta(num_tokens, 5120), tile)
                newest = newest_served(TILES, capability)
                yield (
                    f"cc {capability}, {format.name}, {num_tokens} tokens, rank 32",
                    launch._replace(min_capability=capability, max_capability=newest),
                )
