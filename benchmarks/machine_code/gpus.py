"""GPUs' abilities, from their datasheets and NVIDIA's tables of throughput: rates, clocks, and room
for programs.

Rates come from the package (`tempoquant.planning.gpus`). A clock is the one at which the
datasheet's rate is reached.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tempoquant.planning import gpus as datasheets

WARP = 32
SCHEDULERS = 4  # of a multiprocessor, each of which issues one instruction of one warp a cycle
REGISTERS = 65536


class Gpu(NamedTuple):
    """One GPU.

    Attributes:
        capability: 90 for 9.0.
        rates: tensor-core operations a second by operand: "bf16", "fp8", "int8", "fp4".
        shared: bytes of shared memory that the programs of a multiprocessor have, of which each
            takes 1 KiB more.
        float_lanes: float32 additions a cycle of a multiprocessor; integer_lanes: logic and
            comparisons.
    """

    name: str
    capability: int
    multiprocessors: int
    clock: float
    bytes_per_s: float
    rates: Mapping[str, float]
    shared: int
    threads: int
    float_lanes: int = 128
    integer_lanes: int = 64

    def tensor_cycles(self, operations: float, operand: str) -> float:
        """Compute the cycles of one multiprocessor's tensor cores; a product counts as two
        operations.
        """
        return operations * self.multiprocessors * self.clock / self.rates[operand]

    def programs(self, registers: int, shared: int, num_warps: int) -> int:
        """Return how many programs run on a multiprocessor at once."""
        by_warp = -(-registers * WARP // 256) * 256  # a warp's registers are given out 256 at a time
        return max(
            1,
            min(REGISTERS // (by_warp * num_warps), self.shared // (shared + 1024), self.threads // (WARP * num_warps)),
        )


def _gpu(
    name: str,
    multiprocessors: int,
    clock: float,
    shared_kib: int,
    threads: int,
    float_lanes: int = 128,
    integer_lanes: int = 64,
) -> Gpu:
    """Return a GPU of the package's table, with what machine code is counted by."""
    known = datasheets.GPUS[name]
    major, minor = known.capability
    rates = {operand: rate for operand, rate in known.rates.items() if operand in ("bf16", "fp8", "int8", "fp4")}
    return Gpu(
        name,
        10 * major + minor,
        multiprocessors,
        clock,
        known.bytes_per_s,
        rates,
        shared_kib << 10,
        threads,
        float_lanes,
        integer_lanes,
    )


_TABLE = (
    _gpu("A100 80 GB", 108, 1.41e9, 164, 2048, float_lanes=64),
    _gpu("RTX 3090", 82, 1.695e9, 100, 1536),
    _gpu("RTX 4090", 128, 2.52e9, 100, 1536),
    _gpu("H100 SXM", 132, 1.83e9, 228, 2048),
    _gpu("B200", 148, 1.856e9, 228, 2048),
    _gpu("RTX 5090", 170, 2.407e9, 100, 1536, integer_lanes=128),
)
GPUS = {gpu.capability: gpu for gpu in _TABLE}
"""By compute capability, 90 for 9.0."""
