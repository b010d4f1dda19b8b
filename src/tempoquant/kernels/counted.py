"""The speed of a Wan block's linears by the counts of `python -m benchmarks.machine_code`:
predicted, not measured.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tempoquant.formats import Format
from tempoquant.kernels.dispatch import Backend, backend_at
from tempoquant.kernels.gpu_names import is_name_of


class CountedGpu(NamedTuple):
    """A GPU whose kernels were counted.

    Attributes:
        name: its own.
        capability: its compute capability.
        ratios: format to how many times as fast as 16 bits at their best the ten linears of a block
            are, with activations of four bits, 32,760 tokens (480 × 832, 81 frames) and rank 32.
            docs/kernels.md has the table.
    """

    name: str
    capability: tuple[int, int]
    ratios: Mapping[str, float]


COUNTED_GPUS = (
    CountedGpu("A100 80 GB", (8, 0), {"int4": 1.17}),
    CountedGpu("RTX 3090", (8, 6), {"int4": 3.52}),
    CountedGpu("RTX 4090", (8, 9), {"nvfp4_m1": 1.77, "int4": 3.17}),
    CountedGpu("H100 SXM", (9, 0), {"nvfp4_m1": 1.51}),
    CountedGpu("B200", (10, 0), {"nvfp4_m1": 2.12, "nvfp4": 1.95}),
    CountedGpu("RTX 5090", (12, 0), {"nvfp4_m1": 6.03, "nvfp4": 6.02}),
)


def counted_for(device_name: str, format: Format, backend: Backend) -> tuple[CountedGpu, float] | None:
    """Return the counted GPU of a device's name, and its ratio; None for any other card, whose
    ratio differs even at the same compute capability, and unless it runs the format by `backend`.
    """
    found = next((each for each in COUNTED_GPUS if is_name_of(device_name, each.name)), None)
    if found is None or backend_at(found.capability, format) is not backend:
        return None
    ratio = found.ratios.get(format.name)
    return None if ratio is None else (found, ratio)
