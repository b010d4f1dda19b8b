"""GPUs' abilities, from their datasheets and NVIDIA's tables of throughput: rates, clocks, and room
for programs.

Rates are dense, with sums in float32 (int32 for integers). A clock is the one at which the
datasheet's rate is reached.
"""

from typing import NamedTuple

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
    rates: dict[str, float]
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


_A100 = {"bf16": 312e12, "int8": 624e12}
_3090 = {"bf16": 71e12, "int8": 284e12}
_4090 = {"bf16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12}
_H100 = {"bf16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12}
_B200 = {"bf16": 2.25e15, "fp8": 4.5e15, "int8": 4.5e15, "fp4": 9.0e15}
_5090 = {"bf16": 209.5e12, "fp8": 419e12, "int8": 838e12, "fp4": 1676e12}

GPUS = {
    80: Gpu("A100 SXM", 80, 108, 1.41e9, 2.039e12, _A100, 164 << 10, 2048, float_lanes=64),
    86: Gpu("RTX 3090", 86, 82, 1.695e9, 0.936e12, _3090, 100 << 10, 1536),
    89: Gpu("RTX 4090", 89, 128, 2.52e9, 1.008e12, _4090, 100 << 10, 1536),
    90: Gpu("H100 SXM", 90, 132, 1.83e9, 3.35e12, _H100, 228 << 10, 2048),
    100: Gpu("B200", 100, 148, 1.856e9, 8.0e12, _B200, 228 << 10, 2048),
    120: Gpu("RTX 5090", 120, 170, 2.407e9, 1.792e12, _5090, 100 << 10, 1536, integer_lanes=128),
}
