"""One kernel for one GPU, counted, and the time that the counts make in some shape. Nothing here
was measured.

    issue     its instructions, one a cycle and scheduler, or the share of its fullest unit
    tensor    its products at the datasheet's rate of the tensor cores
    bytes     the fewest that it must move, at the datasheet's bandwidth
    largest   the longest of the three: everything runs in parallel
    sum       issue and tensor one after the other, or bytes if those take longer
    expected  the sum if one program has a multiprocessor to itself and waits in each step until
              its tensor cores are idle; if it keeps some work for them in flight, only the code
              outside its loop is added; the largest if several programs share a multiprocessor

Latencies, caches, and clocks that fall under load are left out, for BF16's times (`least_bf16`) as
well.
"""

from collections import Counter
from typing import NamedTuple

from benchmarks.machine_code.compiling import binary_of
from benchmarks.machine_code.gpus import SCHEDULERS, WARP, Gpu
from benchmarks.machine_code.listing import Listing, Loop, parse, units_of
from tempoquant.kernels.launch import Launch
from tempoquant.kernels.triton_quantize_kernel import EIGHT_BIT_TILES


class Counted(NamedTuple):
    """One kernel, compiled for one GPU.

    Attributes:
        programs: that run on a multiprocessor at once.
    """

    name: str
    gpu: Gpu
    launch: Launch
    registers: int
    stack: int
    shared: int
    programs: int
    listing: Listing

    @property
    def num_warps(self) -> int:
        """Return the warps of a program."""
        return int(self.launch.options.get("num_warps", 4))


class Times(NamedTuple):
    """Seconds, as the module defines them."""

    issue: float
    tensor: float
    bytes: float
    expected: float

    @property
    def largest(self) -> float:
        """Return the longest part: everything runs in parallel."""
        return max(self.issue, self.tensor, self.bytes)

    @property
    def sum(self) -> float:
        """Return issue and tensor one after the other, or bytes if they take longer."""
        return max(self.issue + self.tensor, self.bytes)


class Work(NamedTuple):
    """The work of a launch in some shape.

    Attributes:
        programs: their number.
        trips: the iterations of each of the kernel's loops in a program; 0 for a rare one.
        operations: of a program on tensor cores, two a product, in its loops.
        operand: of these operations.
        bytes: of all programs, each byte of an input or output once.
    """

    programs: int
    trips: tuple[int, ...]
    operations: float
    operand: str
    bytes: float


def count(name: str, launch: Launch, gpu: Gpu) -> Counted:
    """Compile a launch and count its code."""
    binary = binary_of(launch, gpu.capability)
    programs = gpu.programs(binary.registers, binary.shared, launch.options.get("num_warps", 4))
    return Counted(name, gpu, launch, binary.registers, binary.stack, binary.shared, programs, parse(binary.listing))


def cycles_of(counts: Counter[str], num_warps: int, gpu: Gpu) -> float:
    """Count the cycles of a multiprocessor for these instructions of each warp."""
    units = units_of(counts)
    slots = {
        "all": counts.total(),
        "float32": units["float32"] * 128 / gpu.float_lanes,
        "integer": units["integer"] * 128 / gpu.integer_lanes,
        "multiplier": units["multiplier"] * 2,
        "special": units["special"] * 8,
        "memory": units["memory"] * 4,
    }
    return max(slots.values()) * num_warps / SCHEDULERS


def times(counted: Counted, work: Work) -> Times:
    """Compute the seconds of a launch with that much work."""
    gpu = counted.gpu
    loops = counted.listing.loops
    if len(loops) != len(work.trips):
        raise ValueError(f"{counted.name} has {len(loops)} loops that work, and {len(work.trips)} were expected.")
    inside = sum(
        trips * cycles_of(loop.counts, counted.num_warps, gpu) for loop, trips in zip(loops, work.trips, strict=True)
    )
    outside = cycles_of(counted.listing.outside, counted.num_warps, gpu)
    tensor = gpu.tensor_cycles(work.operations, work.operand)
    alone = counted.programs == 1
    drains = any(drains_tensor_cores(loop) for loop in loops)
    program = max(inside + outside, tensor)
    if alone and tensor:
        program = (inside + tensor if drains else max(inside, tensor)) + outside
    rounds = -(-work.programs // gpu.multiprocessors)  # programs of a multiprocessor share its units, so each counts
    seconds = rounds / gpu.clock
    moved = work.bytes / gpu.bytes_per_s
    return Times(seconds * (inside + outside), seconds * tensor, moved, max(seconds * program, moved))


def drains_tensor_cores(loop: Loop) -> bool:
    """Return whether a loop waits, in each iteration, until no product is in flight (Hopper's
    asynchronous ones).
    """
    return any(name.startswith("WARPGROUP.DEPBAR") and name.endswith("0x0") for name in loop.counts)


def usual_loops(counted: Counted) -> tuple[Loop, ...]:
    """Return the loops that a program runs for any numbers.

    Four bits are rounded in one pass; a second follows only if a row is not usual
    (`triton_rounding.is_usual`).
    """
    is_four_bits = counted.launch.arguments.get("ALL_EIGHT_BITS") is False
    return counted.listing.loops[:1] if is_four_bits else counted.listing.loops


def instructions_a_number(counted: Counted) -> float | None:
    """Count the instructions of a rounding kernel's usual loops for each number; None for other
    kernels.
    """
    if "BLOCK_COLUMNS" not in counted.launch.arguments:
        return None
    return sum(loop.size for loop in usual_loops(counted)) / tiles_a_time(counted) / numbers_a_thread(counted)


def tiles_a_time(counted: Counted) -> int:
    """Return how many tiles a usual loop of a rounding kernel takes each time around."""
    return 1 if counted.launch.arguments["ALL_EIGHT_BITS"] is False else int(EIGHT_BIT_TILES)


def numbers_a_thread(counted: Counted) -> float:
    """Return how many numbers of a tile a thread of a rounding kernel has."""
    arguments = counted.launch.arguments
    return arguments["BLOCK_ROWS"] * arguments["BLOCK_COLUMNS"] / (WARP * counted.num_warps)
