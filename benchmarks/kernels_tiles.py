"""Times of the FP8 product by tile, for choosing the table in kernels/fp8.py on a GPU.

    python -m benchmarks.kernels_tiles [--tokens 32760] [--bf16]

Each tile's result is compared with the table's before it is timed. Tiles that do not fit the GPU
say so.
"""

import argparse
import sys

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels_methods import MAX_PRODUCT_ERROR, relative_error
from benchmarks.kernels_roofline import bf16_linear
from benchmarks.registry import VIDEO_TOKENS, Shape, shapes_of_block
from tempoquant.kernels import bf16, fp8
from tempoquant.kernels.triton_gemm import Product, Tile, capability_of, multiply

RANK = 32
# By the bytes of an operand: halves of 64 and 128 outputs, with fewer and more tokens, stages and
# warps.
CANDIDATES = {
    1: [
        Tile(128, 128, 128, 8, 4),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 128, 64, 8, 6),
        Tile(128, 64, 128, 8, 4),
        Tile(128, 64, 128, 4, 3),
        Tile(256, 64, 128, 8, 3),
        Tile(64, 128, 128, 4, 3),
        Tile(64, 64, 128, 4, 4),
        Tile(128, 64, 64, 8, 4),
        Tile(128, 64, 64, 4, 4),
    ],
    2: [
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 8, 4),
        Tile(128, 64, 64, 4, 3),
        Tile(256, 64, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 64, 32, 8, 4),
    ],
}


def random_product(shape: Shape, dtype: torch.dtype, device: torch.device) -> Product:
    """Make operands of a linear with a branch and a bias."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device)

    is_fp8 = dtype.itemsize == 1
    return Product(
        values=random(shape.num_tokens, shape.in_features).to(dtype),
        weight=random(shape.out_features, shape.in_features).to(dtype),
        row_scale=random(shape.num_tokens).abs() if is_fp8 else None,
        column_scale=random(shape.out_features).abs() if is_fp8 else random(1).abs().expand(shape.out_features),
        hidden=random(shape.num_tokens, RANK).bfloat16(),
        up=random(shape.out_features, RANK).bfloat16(),
        bias=random(shape.out_features).bfloat16(),
    )


def print_times(shape: Shape, dtype: torch.dtype, device: torch.device, console: Console) -> bool:
    """Print a table with a row a tile, fetched through pointers and by the copy engine; return
    whether all were right.
    """
    from benchmarks.kernels_timing import time_ms

    tiles = fp8.TILES if dtype.itemsize == 1 else bf16.TILES
    product, capability = random_product(shape, dtype, device), capability_of(device)
    wanted = multiply(product, torch.bfloat16, tiles)
    table = Table(title=f"{shape}, {dtype}", title_justify="left")
    for name in ("tile", "pointers, ms", "TFLOP/s", "described, ms", "TFLOP/s"):
        table.add_column(name, justify="left" if name == "tile" else "right")
    all_right = True
    for tile in CANDIDATES[dtype.itemsize]:
        cells = []
        for is_described in (False, True) if capability >= 90 else (False,):
            chosen = {capability: (tile, tile)}
            arguments = (product, torch.bfloat16, chosen, capability, is_described)
            try:
                error = relative_error(multiply(*arguments), wanted)
            except Exception as reason:  # above all too much shared memory
                cells += [type(reason).__name__, ""]
                continue
            if not error <= MAX_PRODUCT_ERROR:
                cells += [f"WRONG by {error:.1e}", ""]
                all_right = False
                continue
            ms = time_ms(lambda arguments=arguments: multiply(*arguments))
            cells += [f"{ms:.3f}", f"{bf16_linear(shape).flops / ms / 1e9:.0f}"]
        table.add_row(" · ".join(map(str, tile)), *cells)
    console.print(table)
    return all_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=next(iter(VIDEO_TOKENS.values())), help="of the video")
    parser.add_argument("--bf16", action="store_true", help="time the BF16 product in place of FP8")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU, so no tile was timed.")
        return 0
    dtype = torch.bfloat16 if arguments.bf16 else torch.float8_e4m3fn
    console = Console(width=120)
    are_right = [
        print_times(shape, dtype, torch.device("cuda"), console) for shape in shapes_of_block(arguments.tokens)
    ]
    return 0 if all(are_right) else 1


if __name__ == "__main__":
    sys.exit(main())
