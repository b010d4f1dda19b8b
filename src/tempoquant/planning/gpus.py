"""GPUs by their datasheets: the one table of rates for predictions and benchmarks.

Rates are dense, with sums in float32 (int32 for integers): a datasheet's figure "with sparsity" is
halved, and GeForce cards count with sums in float32, not float16. PCIe counts one direction of 16
lanes. Sources, NVIDIA's:

    A100 80 GB        A100 datasheet, SXM
    RTX 3090          GA102 whitepaper, appendix A
    RTX 4090, L40S    Ada whitepaper, appendix A; L40S datasheet
    H100, H200        H100 datasheet, SXM; H200 datasheet, SXM
    B200              Blackwell datasheet, one GPU of an HGX B200
    RTX 5090          RTX Blackwell whitepaper, appendix A
    RTX PRO 6000      RTX Blackwell PRO whitepaper, Workstation Edition
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tempoquant.errors import SettingsError
from tempoquant.kernels.gpu_names import is_name_of

Operand = Literal["bf16", "fp8", "int8", "fp4", "tf32", "fp32"]
"""The operands of a product: "bf16" is float16 too; "fp32" runs outside of tensor cores."""
OPERANDS: tuple[Operand, ...] = get_args(Operand)

PCIE_4, PCIE_5 = 31.5e9, 63.0e9
DATASHEET = "datasheet rates"


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: for people, one of `CARDS`; `gpu_named` takes it in any spelling.
        capability: compute capability.
        memory_gib: of the device.
        bytes_per_s: of its memory.
        pcie_bytes_per_s: from host memory to it.
        rates: operations a second by what is multiplied, two a product; what it cannot multiply is
            absent.
        source: of the rates, for people.
    """

    name: str
    capability: tuple[int, int]
    memory_gib: float
    bytes_per_s: float
    pcie_bytes_per_s: float
    rates: Mapping[Operand, float]
    source: str = DATASHEET


def _tera(**rates: float) -> dict[Operand, float]:
    return {operand: 1e12 * rates[operand] for operand in OPERANDS if operand in rates}


_HOPPER = _tera(bf16=989.4, fp8=1978.9, int8=1978.9, tf32=494.7, fp32=66.9)
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 3090", (8, 6), 24, 0.936e12, PCIE_4, _tera(bf16=71, int8=284, tf32=35.6, fp32=35.6)),
        Gpu("RTX 4090", (8, 9), 24, 1.008e12, PCIE_4, _tera(bf16=165.2, fp8=330.3, int8=660.6, tf32=82.6, fp32=82.6)),
        Gpu(
            "RTX 5090",
            (12, 0),
            32,
            1.792e12,
            PCIE_5,
            _tera(bf16=209.5, fp8=419, int8=838, fp4=1676, tf32=104.8, fp32=104.8),
        ),
        Gpu("L40S", (8, 9), 48, 0.864e12, PCIE_4, _tera(bf16=362.05, fp8=733, int8=733, tf32=183, fp32=91.6)),
        Gpu(
            "RTX PRO 6000",
            (12, 0),
            96,
            1.792e12,
            PCIE_5,
            _tera(bf16=503.8, fp8=1007.6, int8=1007.6, fp4=2015.2, tf32=251.9, fp32=126),
        ),
        Gpu("A100 80 GB", (8, 0), 80, 2.039e12, PCIE_4, _tera(bf16=312, int8=624, tf32=156, fp32=19.5)),
        Gpu("H100 SXM", (9, 0), 80, 3.35e12, PCIE_5, _HOPPER),
        Gpu("H200", (9, 0), 141, 4.8e12, PCIE_5, _HOPPER),
        Gpu("B200", (10, 0), 180, 8.0e12, PCIE_5, _tera(bf16=2250, fp8=4500, int8=4500, fp4=9000, tf32=1100, fp32=75)),
    )
}
"""GPUs by their name."""

_TYPICAL = {(8, 0): "A100 80 GB", (9, 0): "H100 SXM", (12, 0): "RTX 5090", (8, 9): "RTX 4090"}
"""The GPU that represents a compute capability that several have."""


def gpu_named(name: str) -> Gpu:
    """Return the GPU of a name such as "rtx-4090", "H100" or "NVIDIA A100-SXM4-80GB".

    Raises:
        SettingsError: there is none. A variant with other rates or another memory is none.
    """
    found = next((gpu for gpu in GPUS.values() if is_name_of(name, gpu.name)), None)
    if found is None:
        raise SettingsError(f"{name!r} is none of the GPUs whose datasheets are known: give one of {', '.join(GPUS)}.")
    return found


def gpu_of_capability(text: str) -> Gpu:
    """Return the GPU that stands for a compute capability such as "8.9".

    Raises:
        SettingsError: it is no compute capability, or no GPU of it is in the table.
    """
    known = sorted({gpu.capability for gpu in GPUS.values()})
    parts = re.fullmatch(r"(\d+)\.(\d)", text)
    asked = None if parts is None else (int(parts[1]), int(parts[2]))
    if asked not in known:
        shown = ", ".join(f"{major}.{minor}" for major, minor in known)
        raise SettingsError(f"no GPU of compute capability {text} is in the table: give one of {shown}, or --gpu.")
    alike = [gpu for gpu in GPUS.values() if gpu.capability == asked]
    return GPUS[_TYPICAL.get(alike[0].capability, alike[0].name)]


def measured(gpu: Gpu, name: str, bytes_per_s: float, bf16: float, fp8: float | None) -> Gpu:
    """Return a GPU with measured rates; others keep their datasheet's ratio to 16-bit products.

    Args:
        name: what the measurement calls it.
        bytes_per_s, bf16, fp8: bytes, and operations, a second; None for what it cannot multiply.
    """
    share = bf16 / gpu.rates["bf16"]
    rates = {operand: rate * share for operand, rate in gpu.rates.items()}
    rates["bf16"] = bf16
    if fp8 is not None:
        rates["fp8"] = fp8
    source = f"rates measured on {name}"
    return dataclasses.replace(gpu, name=name, bytes_per_s=bytes_per_s, rates=rates, source=source)
