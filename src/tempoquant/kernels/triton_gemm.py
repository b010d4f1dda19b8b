"""One matrix product for FP8 and BF16 operands, with everything that follows it in its epilogue.

    y = (values · weightᵀ) · row_scale[token] · column_scale[output] + hidden · upᵀ + bias

Operands are exact, sums are float32, and y is rounded once. FP8 tensor cores of Ada and Hopper keep
about 14 bits of a running sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2; MMA-Sim, arXiv
2511.10909). That error is small beside that of four bits, so by default sums are not promoted.
Within `dispatch.promoted_sums` each `Tile.inner` products, at most 128, are summed separately and
then added in float32. docs/kernels.md gives the error and the cost of both.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tempoquant.kernels.dispatch import are_sums_promoted
from tempoquant.kernels.launch import NATIVE_FP8, Launch, NamedLaunches, dense, with_rows
from tempoquant.kernels.triton_tile import ROWS_AT_ONCE, finish, place_of_tile, rank_blocks, row_starts

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4: operands come through pointers
    TensorDescriptor = None

INTERPRETED_CAPABILITY = 90


class Tile(NamedTuple):
    """The sizes of one program's share of y, (tokens, 2 · outputs); it sums `inner` products at a
    time.
    """

    tokens: int
    outputs: int
    inner: int
    num_warps: int
    num_stages: int


class Product(NamedTuple):
    """The operands of a product, and the steps after it. `multiply` copies operands that its kernel
    cannot read in place.

    Attributes:
        values, weight: (tokens, in) and (out, in), both 8-bit floats or both bfloat16.
        row_scale: (tokens,) float32, or None.
        column_scale: (out,) float32 of any stride, or None.
        hidden, up: (tokens, rank) and (out, rank) bfloat16, or None.
        bias: (out,), or None.
    """

    values: torch.Tensor
    weight: torch.Tensor
    row_scale: torch.Tensor | None
    column_scale: torch.Tensor | None
    hidden: torch.Tensor | None
    up: torch.Tensor | None
    bias: torch.Tensor | None

    def laid_out(self) -> "Product":
        """Return the same numbers in a layout that the kernel reads, copied where needed."""
        column_scale = self.column_scale  # read by its stride
        return Product(
            with_rows(self.values), with_rows(self.weight), dense(self.row_scale), column_scale, with_rows(self.hidden),
            with_rows(self.up), dense(self.bias),
        )  # fmt: skip


@triton.jit
def gemm_kernel(  # noqa: PLR0913
    values: tl.tensor, weight: tl.tensor, y: tl.tensor, row_scale: tl.tensor, column_scale: tl.tensor, hidden:
    tl.tensor, up: tl.tensor, bias: tl.tensor,
    num_tokens: int, num_outputs: int, rank: int,
    values_stride: int, weight_stride: int, y_stride: int, column_scale_stride: int, hidden_stride: int, up_stride: int,
    NUM_INNER: tl.constexpr, IS_DESCRIBED: tl.constexpr, SUMMED_APART: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, RANKS: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """Compute a tile of y, TOKENS × 2 OUTPUTS.

    SUMMED_APART selects who promotes FP8 sums: "mma" the compiler, "add" this kernel, "no" nobody,
    where it is not needed. The tile is multiplied in two halves, so that only one half at a time
    needs registers for a separate sum.
    """
    first_token, first_output = place_of_tile(num_tokens, num_outputs, TOKENS, 2 * OUTPUTS, ROWS_AT_ONCE)
    left = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    right = tl.zeros((TOKENS, OUTPUTS), dtype=tl.float32)
    if not IS_DESCRIBED:
        values_rows = row_starts(values, first_token, num_tokens, values_stride, TOKENS)
        left_rows = row_starts(weight, first_output, num_outputs, weight_stride, OUTPUTS)
        right_rows = row_starts(weight, first_output + OUTPUTS, num_outputs, weight_stride, OUTPUTS)
    for start in range(0, NUM_INNER, INNER):
        if IS_DESCRIBED:
            x = values.load([first_token, start])
            left_w = weight.load([first_output, start])
            right_w = weight.load([first_output + OUTPUTS, start])
        else:
            inner = start + tl.arange(0, INNER)[None, :]
            x = tl.load(values_rows + inner, mask=inner < NUM_INNER, other=0.0)
            left_w = tl.load(left_rows + inner, mask=inner < NUM_INNER, other=0.0)
            right_w = tl.load(right_rows + inner, mask=inner < NUM_INNER, other=0.0)
        left = _add_product(left, x, left_w, SUMMED_APART, UPCAST)
        right = _add_product(right, x, right_w, SUMMED_APART, UPCAST)
    is_stored = first_token + tl.arange(0, TOKENS) < num_tokens
    for half in tl.static_range(2):
        output = first_output + half * OUTPUTS
        if output < num_outputs:
            finish(
                left if half == 0 else right, y, row_scale, column_scale, hidden, up, bias, is_stored,
                first_token, output, num_tokens, num_outputs, rank,
                y_stride, column_scale_stride, hidden_stride, up_stride, TOKENS, OUTPUTS, RANKS, RANK_BLOCKS, UPCAST,
            )  # fmt: skip


@triton.jit
def _add_product(
    total: tl.tensor, x: tl.tensor, w: tl.tensor, SUMMED_APART: tl.constexpr, UPCAST: tl.constexpr
) -> tl.tensor:
    """Return total + x · wᵀ."""
    if UPCAST:  # the interpreter cannot multiply bfloat16
        x, w = x.to(tl.float32), w.to(tl.float32)
    if SUMMED_APART == "mma":
        return tl.dot(x, w.T, total, max_num_imprecise_acc=x.shape[1])
    elif SUMMED_APART == "add":
        return total + tl.dot(x, w.T, max_num_imprecise_acc=x.shape[1])  # with 0 the compiler would fuse the addition
    else:
        return tl.dot(x, w.T, total)


Tiles = dict[int, tuple[Tile, Tile]]
"""Tiles by compute capability: one for many tokens, and one for no more tokens than it has
itself.
"""


def tile_for(tiles: Tiles, num_tokens: int, capability: int) -> Tile:
    """Return the tile of the newest generation that is not newer than the device."""
    many, few = tiles[max(known for known in tiles if known <= max(capability, min(tiles)))]
    return few if num_tokens <= few.tokens else many


def newest_served(tiles: Tiles, capability: int) -> int:
    """Return the newest compute capability that takes the tiles of this one."""
    return min((known - 1 for known in tiles if known > capability), default=999)


def capability_of(device: torch.device) -> int:
    """Return the compute capability, 90 for 9.0; the interpreter counts as Hopper."""
    if device.type != "cuda":
        return INTERPRETED_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def how_sums_are_split(dtype: torch.dtype, capability: int) -> str:
    """Return the kernel's SUMMED_APART. Only FP8 sums are short, except on Blackwell's data centre
    GPUs (tcgen05).
    """
    if dtype.itemsize > 1 or capability // 10 == 10 or not are_sums_promoted():
        return "no"
    return "mma" if capability // 10 == 9 else "add"


def can_describe(operands: tuple[torch.Tensor, ...], capability: int) -> bool:
    """Return whether the bulk copy engine can and should fetch tiles of all operands: rows must
    start at 16-byte addresses.

    RTX Blackwell has the engine too, but multiplies from registers, where descriptors cost more of
    them than pointers.
    """
    return TensorDescriptor is not None and capability // 10 in (9, 10) and all(map(_is_aligned, operands))


def _is_aligned(matrix: torch.Tensor) -> bool:
    overlaps = matrix.stride(0) < matrix.shape[1]  # one row stands for all
    return not overlaps and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def gemm_launch(product: Product, y: torch.Tensor, tile: Tile, capability: int, is_described: bool) -> Launch:
    """Return the launch that fills y (tokens, out), of any float dtype."""
    values, weight, row_scale, column_scale, hidden, up, bias = product
    rank = 0 if up is None else up.shape[1]
    if rank == 0:
        hidden = up = None
    return Launch(
        gemm_kernel,
        (triton.cdiv(len(values), tile.tokens) * triton.cdiv(len(weight), 2 * tile.outputs),),
        {
            "values": _operand(values, tile.tokens, tile.inner, is_described),
            "weight": _operand(weight, tile.outputs, tile.inner, is_described),
            "y": y, "row_scale": row_scale, "column_scale": column_scale, "hidden": hidden, "up": up, "bias": bias,
            "num_tokens": len(values), "num_outputs": len(weight), "rank": rank,
            "values_stride": values.stride(0), "weight_stride": weight.stride(0), "y_stride": y.stride(0),
            "column_scale_stride": 0 if column_scale is None else column_scale.stride(0),
            "hidden_stride": 0 if hidden is None else hidden.stride(0),
            "up_stride": 0 if up is None else up.stride(0),
            "NUM_INNER": values.shape[1], "IS_DESCRIBED": is_described,
            "SUMMED_APART": how_sums_are_split(values.dtype, capability), "UPCAST": is_interpreted(),
            "TOKENS": tile.tokens, "OUTPUTS": tile.outputs, "INNER": tile.inner, **rank_blocks(rank),
            "ROWS_AT_ONCE": ROWS_AT_ONCE,
        },
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
        NATIVE_FP8 if values.element_size() == 1 else 80,
    )  # fmt: skip


def is_interpreted() -> bool:
    """Return whether Triton runs kernels in Python (TRITON_INTERPRET=1)."""
    return not isinstance(gemm_kernel, triton.runtime.JITFunction)


def new_output(values: torch.Tensor, num_outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate y; float32 under the interpreter, which truncates bfloat16 instead of rounding."""
    return values.new_empty(len(values), num_outputs, dtype=torch.float32 if is_interpreted() else dtype)


def _operand(matrix: torch.Tensor, rows: int, inner: int, is_described: bool) -> Any:
    return TensorDescriptor.from_tensor(matrix, [rows, inner]) if is_described else matrix


def multiply(
    product: Product, dtype: torch.dtype, tiles: Tiles, capability: int | None = None, is_described: bool | None = None
) -> torch.Tensor:
    """Multiply on the current stream of the operands' device.

    Args:
        dtype: of the result.
        capability: compute capability that selects the tile and the way of summing; None for the
            device's.
        is_described: whether the bulk copy engine fetches tiles; None for wherever it can.

    Returns:
        (tokens, out).
    """
    product = product.laid_out()
    values, weight = product.values, product.weight
    y = new_output(values, len(weight), dtype)
    if y.numel() == 0:
        return y.to(dtype)
    capability = capability_of(values.device) if capability is None else capability
    if is_described is None:
        is_described = can_describe((values, weight), capability)
    tile = tile_for(tiles, len(values), capability)
    gemm_launch(product, y, tile, capability, is_described).run()
    return y.to(dtype)


def wan_launches(dtype: torch.dtype, tiles: Tiles) -> NamedLaunches:
    """Return the launches of Wan2.2 with operands of that dtype, for each generation of GPUs: many
    tokens and one, by rank.

    128 divides all inputs and outputs of its linears; a shape affects the code in no other way.
    """
    for capability, (many, few) in tiles.items():
        newest = newest_served(tiles, capability)
        for tile, num_tokens in ((many, 32_760), (few, 1)):
            for rank in (0, 32):
                product = _meta_product(dtype, num_tokens, rank)
                y = torch.empty(num_tokens, 5120, dtype=torch.bfloat16, device="meta")
                for is_described in (False, True) if capability // 10 in (9, 10) else (False,):
                    name = f"cc {capability}, {num_tokens} tokens, rank {rank}{', described' if is_described else ''}"
                    launch = gemm_launch(product, y, tile, capability, is_described)
                    yield name, launch._replace(min_capability=capability, max_capability=newest)


def _meta_product(dtype: torch.dtype, num_tokens: int, rank: int) -> Product:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    has_rows = dtype.itemsize == 1
    return Product(
        meta(num_tokens, 5120, dtype=dtype),
        meta(5120, 5120, dtype=dtype),
        meta(num_tokens, dtype=torch.float32) if has_rows else None,
        meta(5120, dtype=torch.float32) if has_rows else meta(dtype=torch.float32).expand(5120),
        meta(num_tokens, rank) if rank else None,
        meta(5120, rank) if rank else None,
        meta(5120),
    )
