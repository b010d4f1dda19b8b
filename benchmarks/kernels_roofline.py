"""The least time of each stage of a linear: its operations over the rate of their unit, or the
fewest bytes it must move over the memory's bandwidth, whichever is longer. Computed, never
measured.

A stage is one kernel: it writes its output to device memory, and the next one reads it from there.
"""

from typing import NamedTuple

from benchmarks.registry import BLOCK_LINEARS, Shape, inputs_of_block, shapes_of_block

WEIGHT_BYTES = 0.5 + 1 / 16  # of nvfp4_m1: a code and a sixteenth of a scale
RANK = 32


class Rates(NamedTuple):
    """A GPU's rates: bytes a second, and floating-point operations a second by operand."""

    name: str
    bytes_per_s: float
    bf16_flops: float
    fp8_flops: float


H100_SXM = Rates("H100 SXM, datasheet, dense", 3.35e12, 989e12, 1979e12)


class Work(NamedTuple):
    """The work of one stage. A product's operations count twice: multiply and add."""

    flops: float
    bytes: float
    is_fp8: bool = False

    def floor_s(self, rates: Rates) -> float:
        """Return the least time."""
        rate = rates.fp8_flops if self.is_fp8 else rates.bf16_flops
        return max(self.flops / rate, self.bytes / rates.bytes_per_s)


def bf16_linear(shape: Shape) -> Work:
    """Return the work of the product that four bits replace."""
    tokens, inner, outer = shape
    return Work(2.0 * tokens * inner * outer, 2.0 * (tokens * inner + inner * outer + tokens * outer))


def project(shape: Shape, rank: int = RANK) -> Work:
    """Return the work of hidden = x · downᵀ: 16-bit x is read once more for it."""
    tokens, inner, _ = shape
    return Work(2.0 * tokens * inner * rank, 2.0 * (tokens * inner + rank * inner + tokens * rank))


def quantize(shape: Shape, value_bytes: int = 1, rank: int = RANK) -> Work:
    """Return the work of smoothing, subtracting hidden · deflationᵀ and the offset, and rounding: x
    in 16 bits in, values out.
    """
    tokens, inner, _ = shape
    return Work(2.0 * tokens * inner * rank, (2.0 + value_bytes) * tokens * inner + 2.0 * (tokens + inner) * rank)


def expand(shape: Shape, value_bytes: int = 1) -> Work:
    """Return the work of expanding a weight from four bits to the buffer that the product reads."""
    weights = float(shape.in_features * shape.out_features)
    return Work(0.0, (WEIGHT_BYTES + value_bytes) * weights)


def multiply(shape: Shape, value_bytes: int = 1, rank: int = RANK) -> Work:
    """Return the work of the product with branch and bias in its epilogue: y in 16 bits."""
    tokens, inner, outer = shape
    moved = value_bytes * (tokens * inner + inner * outer) + 2.0 * tokens * outer + 2.0 * (tokens + outer) * rank
    return Work(2.0 * tokens * inner * outer, moved, is_fp8=value_bytes == 1)


class Floors(NamedTuple):
    """Least times of one linear in seconds: the BF16 product, and the four stages of ours in
    FP8.
    """

    bf16: float
    project: float
    quantize: float
    expand: float
    multiply: float

    @property
    def alone(self) -> float:
        """Return our least time if no other linear reads the same input."""
        return self.project + self.quantize + self.expand + self.multiply


def floors(shape: Shape, rates: Rates) -> Floors:
    """Compute the least times of one linear."""
    works = (bf16_linear(shape), project(shape), quantize(shape), expand(shape), multiply(shape))
    return Floors(*(work.floor_s(rates) for work in works))


def block_floors(video_tokens: int, rates: Rates) -> tuple[float, float]:
    """Compute (BF16, ours) for the ten linears of a block, in seconds; ours rounds a shared input
    once.
    """
    by_shape = {shape: floors(shape, rates) for shape in shapes_of_block(video_tokens)}
    linears = [by_shape[linear.shape(video_tokens)] for linear in BLOCK_LINEARS]
    inputs = [by_shape[shape] for shape in inputs_of_block(video_tokens).values()]
    ours = sum(floor.expand + floor.multiply for floor in linears)
    return sum(floor.bf16 for floor in linears), ours + sum(floor.project + floor.quantize for floor in inputs)
