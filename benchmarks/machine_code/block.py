"""The ten linears of a Wan block, each by the kernels that a GPU runs: the counted times beside
BF16.

BF16's product is the vendor's, whose code is not available: it gets the least possible time at the
datasheet's rates, which it does not reach. So the ratios are against the best that BF16 could do.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import triton

from benchmarks import kernels_roofline as roofline
from benchmarks.machine_code.counting import Counted, Times, Work, tiles_a_time, times, usual_loops
from benchmarks.machine_code.gpus import GPUS, Gpu
from benchmarks.registry import BLOCK_LINEARS, Shape, inputs_of_block


class Way(NamedTuple):
    """One way to run a block on one GPU: its kernels by the names of their launches.

    Attributes:
        bits: of activations. expand: empty if nothing is expanded. operand: of the tensor cores.
    """

    format: str
    bits: int
    capability: int
    quantize: str
    expand: str
    multiply: str
    operand: str
    value_bytes: float

    @property
    def name(self) -> str:
        """Return its name for people."""
        return f"{self.format}, W4A{self.bits}, {self.operand} products"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Return the names of its stages' launches."""
        return tuple(name for name in (self.quantize, self.expand, self.multiply) if name)


def _fp8(capability: int, bits: int, described: str = "") -> Way:
    product = f"fp8: cc {capability}, 32760 tokens, rank 32{described}"
    return Way(
        "nvfp4_m1",
        bits,
        capability,
        _rounding("fp8 nvfp4_m1", bits, capability),
        "expand: fp8 nvfp4_m1",
        product,
        "fp8",
        1,
    )


def _int8(capability: int, bits: int) -> Way:
    product = f"int8: cc {80 if capability == 80 else 86}, 32760 tokens, rank 32"
    return Way(
        "int4", bits, capability, _rounding("int8 int4", bits, capability), "expand: int8 int4", product, "int8", 1
    )


def _fp4(capability: int, format: str) -> Way:
    product = f"fp4: cc {capability}, {format}, 32760 tokens, rank 32"
    return Way(format, 4, capability, _rounding(f"fp4 {format}", 4, capability), "", product, "fp4", 0.5 + 1 / 16)


def _rounding(what: str, bits: int, capability: int) -> str:
    """Return the name of the launch that rounds inputs."""
    first = 80 if capability < 100 else 100 if capability < 110 else 110
    return f"quantize: {what}, rank 32, {bits} bits, cc {first}"


WAYS = (
    *(_int8(capability, bits) for capability in (80, 86, 89) for bits in (4, 8)),
    _fp8(89, 4),
    _fp8(89, 8),
    _fp8(90, 4, ", described"),
    _fp8(90, 8, ", described"),
    _fp4(100, "nvfp4_m1"),
    _fp4(100, "nvfp4"),
    _fp8(100, 8, ", described"),
    _fp4(120, "nvfp4_m1"),
    _fp4(120, "nvfp4"),
    _fp8(120, 8),
)


class Linear(NamedTuple):
    """Seconds of one shape: BF16's least, and ours by stages."""

    shape: Shape
    bf16: float
    project: float
    quantize: Times
    expand: Times
    multiply: Times


class Block(NamedTuple):
    """Seconds of a block's ten linears, by how much runs beside what; an input that linears share
    is rounded once.
    """

    bf16: float
    expected: float
    largest: float
    sum: float


def least_bf16(shape: Shape, gpu: Gpu) -> float:
    """Compute the least seconds of the product that four bits replace."""
    return roofline.bf16_linear(shape).floor_s(rates_of(gpu))


def rates_of(gpu: Gpu) -> roofline.Rates:
    """Return the GPU's rates for the roofline."""
    return roofline.Rates(gpu.name, gpu.bytes_per_s, gpu.rates["bf16"], gpu.rates.get("fp8", gpu.rates["bf16"]))


def linear(way: Way, kernels: Mapping[str, Counted], shape: Shape) -> Linear:
    """Compute one linear of that shape; `kernels` by (name) for the way's GPU."""
    gpu = GPUS[way.capability]
    quantize, multiply = kernels[way.quantize], kernels[way.multiply]
    nothing = Times(0.0, 0.0, 0.0, 0.0)
    expand = kernels.get(way.expand)
    return Linear(
        shape,
        least_bf16(shape, gpu),
        roofline.project(shape).floor_s(rates_of(gpu)),
        times(quantize, quantize_work(quantize, shape, way.value_bytes)),
        nothing if expand is None else times(expand, expand_work(expand, shape, way.value_bytes)),
        times(multiply, multiply_work(multiply, shape, way)),
    )


def block(way: Way, kernels: Mapping[str, Counted], video_tokens: int) -> Block:
    """Compute the ten linears of a block of that many tokens."""
    shapes = [each.shape(video_tokens) for each in BLOCK_LINEARS]
    by_shape = {shape: linear(way, kernels, shape) for shape in set(shapes)}
    inputs = [by_shape[shape] for shape in inputs_of_block(video_tokens).values()]
    linears = [by_shape[shape] for shape in shapes]

    def total(seconds: Callable[[Times], float]) -> float:
        rounded = sum(each.project + seconds(each.quantize) for each in inputs)
        return rounded + sum(seconds(each.expand) + seconds(each.multiply) for each in linears)

    return Block(
        sum(each.bf16 for each in linears),
        total(lambda found: found.expected),
        total(lambda found: found.largest),
        total(lambda found: found.sum),
    )


def quantize_work(counted: Counted, shape: Shape, value_bytes: float) -> Work:
    """Return the work of rounding a linear's input."""
    arguments = counted.launch.arguments
    rows, columns = arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"]
    walks = len(usual_loops(counted))
    trips = tuple(
        triton.cdiv(shape.in_features, columns * tiles_a_time(counted)) if place < walks else 0
        for place in range(len(counted.listing.loops))
    )
    operations = 2.0 * rows * shape.in_features * 2 * arguments["PRODUCT_RANK"] * walks
    moved = roofline.quantize(shape).bytes + (value_bytes - 1) * shape.num_tokens * shape.in_features
    return Work(triton.cdiv(shape.num_tokens, rows), trips, operations, "bf16", moved)


def expand_work(counted: Counted, shape: Shape, value_bytes: float) -> Work:
    """Return the work of expanding a weight."""
    arguments = counted.launch.arguments
    groups = shape.in_features // arguments["GROUP"]
    trips = tuple(triton.cdiv(groups, arguments["BLOCK_GROUPS"]) for _ in counted.listing.loops)
    moved = (roofline.WEIGHT_BYTES + value_bytes) * shape.in_features * shape.out_features
    return Work(triton.cdiv(shape.out_features, arguments["BLOCK_ROWS"]), trips, 0.0, "bf16", moved)


def multiply_work(counted: Counted, shape: Shape, way: Way) -> Work:
    """Return the work of a linear's product, with branch and bias."""
    arguments = counted.launch.arguments
    tokens, inner = arguments["TOKENS"], arguments.get("INNER") or arguments["GROUP"] * arguments["AT_ONCE"]
    outputs = arguments["OUTPUTS"] * (2 if counted.launch.kernel.__name__ == "gemm_kernel" else 1)
    programs = triton.cdiv(shape.num_tokens, tokens) * triton.cdiv(shape.out_features, outputs)
    trips = (triton.cdiv(shape.in_features, inner),) + (0,) * (len(counted.listing.loops) - 1)
    operations = 2.0 * tokens * outputs * shape.in_features
    moved = roofline.multiply(shape).bytes
    moved += (way.value_bytes - 1) * (shape.num_tokens + shape.out_features) * shape.in_features
    return Work(programs, trips, operations, way.operand, moved)


def kernels_of(ways: Iterable[Way]) -> dict[int, set[str]]:
    """Return the names of the launches that ways need, by compute capability."""
    needed: dict[int, set[str]] = {}
    for way in ways:
        needed.setdefault(way.capability, set()).update(way.kernels)
    return needed
