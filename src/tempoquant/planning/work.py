"""Work: operations and bytes of a kernel, and the least seconds that they take at a GPU's rates
(the roofline).

A kernel takes its operations over the rate of the unit that does them, or the fewest bytes that it
must move over the bandwidth of the memory, whichever is longer. Launches, caches and falling
clocks are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from tempoquant.planning.gpus import Gpu, Operand

TENSOR_CORES, MEMORY, TRANSFERS = "tensor cores", "memory", "transfers"
"""What limits a kernel, or a part of a video."""


@dataclass(frozen=True)
class Work:
    """The work of one kernel, or of several equal ones.

    Attributes:
        operations: of each operand, two a product; none where nothing is multiplied in matrices.
        num_bytes: read and written.
        times: how many such kernels there are; a fraction, or less than none, where works are
            extrapolated.
    """

    operations: tuple[tuple[Operand, float], ...]
    num_bytes: float
    times: float = 1.0

    @classmethod
    def of(cls, operand: Operand, operations: float, num_bytes: float) -> "Work":
        """Return the work of a product."""
        return cls(((operand, operations),), num_bytes)

    @classmethod
    def moving(cls, num_bytes: float) -> "Work":
        """Return the work of a kernel that multiplies no matrices."""
        return cls((), num_bytes)

    def repeated(self, times: float) -> "Work":
        """Return the work of so many times as many kernels."""
        return replace(self, times=self.times * times)

    @property
    def num_operations(self) -> float:
        """Count the operations of all operands and kernels."""
        return self.times * sum(number for _, number in self.operations)

    @property
    def bytes_moved(self) -> float:
        """Count the bytes of all kernels."""
        return self.times * self.num_bytes

    def seconds(self, gpu: Gpu) -> "Seconds":
        """Return the least time at a GPU's rates, as that of the unit which sets it."""
        multiplying = sum(number / gpu.rates[operand] for operand, number in self.operations)
        moving = self.num_bytes / gpu.bytes_per_s
        if multiplying >= moving:
            return Seconds(self.times * multiplying, 0.0)
        return Seconds(0.0, self.times * moving)


class Seconds(NamedTuple):
    """Seconds by what sets them: tensor cores, or the GPU's memory."""

    multiplying: float
    moving: float

    @property
    def total(self) -> float:
        """Return the sum of both."""
        return self.multiplying + self.moving

    @property
    def limit(self) -> str:
        """Return what sets most of them."""
        return TENSOR_CORES if self.multiplying >= self.moving else MEMORY


def seconds_of(works: Iterable[Work], gpu: Gpu) -> Seconds:
    """Return the seconds of works, one after the other."""
    each = [work.seconds(gpu) for work in works]
    return Seconds(sum(one.multiplying for one in each), sum(one.moving for one in each))
