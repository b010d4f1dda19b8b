"""The least time of each stage of a linear: its operations over the rate of their unit, or the
fewest bytes it must move over the memory's bandwidth, whichever is longer. Computed, never
measured.

`tempoquant.planning.linear_stages` defines the work of each stage. A stage is one kernel: it writes
its output to device memory, and the next one reads it from there.
"""

from typing import NamedTuple

from benchmarks.registry import BLOCK_LINEARS, Shape, inputs_of_block, shapes_of_block
from tempoquant.planning import linear_stages
from tempoquant.planning.gpus import GPUS, Operand
from tempoquant.planning.linear_stages import Size
from tempoquant.planning.work import Work as PlannedWork

WEIGHT_BYTES = 0.5 + 1 / 16  # of nvfp4_m1: a code and a sixteenth of a scale
RANK = 32


class Rates(NamedTuple):
    """A GPU's rates: bytes a second, and floating-point operations a second by operand."""

    name: str
    bytes_per_s: float
    bf16_flops: float
    fp8_flops: float


_H100 = GPUS["H100 SXM"]
H100_SXM = Rates("H100 SXM, datasheet, dense", _H100.bytes_per_s, _H100.rates["bf16"], _H100.rates["fp8"])


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
    return _of(linear_stages.plain_linear(Size(*shape)))


def project(shape: Shape, rank: int = RANK) -> Work:
    """Return the work of hidden = x · downᵀ: 16-bit x is read once more for it."""
    return _of(linear_stages.project(Size(*shape), rank))


def quantize(shape: Shape, value_bytes: float = 1, rank: int = RANK) -> Work:
    """Return the work of smoothing, subtracting hidden · deflationᵀ and the offset, and rounding: x
    in 16 bits in, values out.
    """
    return _of(linear_stages.quantize(Size(*shape), rank, value_bytes))


def expand(shape: Shape, value_bytes: int = 1) -> Work:
    """Return the work of expanding a weight from four bits to the buffer that the product reads."""
    return _of(linear_stages.expand(Size(*shape), WEIGHT_BYTES, value_bytes))


def multiply(shape: Shape, value_bytes: int = 1, rank: int = RANK) -> Work:
    """Return the work of the product with branch and bias in its epilogue: y in 16 bits."""
    operand: Operand = "fp8" if value_bytes == 1 else "bf16"
    return _of(linear_stages.multiply(Size(*shape), rank, operand, value_bytes))


def _of(work: PlannedWork) -> Work:
    """Return the package's work in the form that measured rates take."""
    return Work(work.num_operations, work.num_bytes, any(operand == "fp8" for operand, _ in work.operations))


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
