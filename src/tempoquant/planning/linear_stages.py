"""The stages of a linear, each with its operations and the fewest bytes that it must move.

A stage is one kernel: what it writes goes to device memory, and the next one reads it from there.
`benchmarks.kernels` prints these floors beside what it measures; `python -m
benchmarks.machine_code` counts what instructions add to them.
"""

import math
from typing import NamedTuple

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import stored_as
from tempoquant.formats import Format
from tempoquant.kernels.dispatch import Backend
from tempoquant.planning.gpus import Operand
from tempoquant.planning.work import Work

_OPERANDS: dict[Backend, Operand] = {
    Backend.FP4: "fp4",
    Backend.FP8: "fp8",
    Backend.INT8: "int8",
    Backend.BF16: "bf16",
    Backend.REFERENCE: "fp32",
}
_VALUE_BYTES = {Backend.FP8: 1.0, Backend.INT8: 1.0, Backend.BF16: 2.0, Backend.REFERENCE: 4.0}


class Size(NamedTuple):
    """The size of a product y (rows, out_features) = x (rows, in_features) · Wᵀ."""

    rows: float
    in_features: int
    out_features: int


def plain_linear(size: Size) -> Work:
    """Return the 16-bit product that four bits replace."""
    rows, inner, outer = size
    return Work.of("bf16", 2.0 * rows * inner * outer, 2.0 * (rows * inner + inner * outer + rows * outer))


def project(size: Size, rank: int) -> Work:
    """Return hidden = x · downᵀ: 16-bit x is read once more for it."""
    rows, inner, _ = size
    return Work.of("bf16", 2.0 * rows * inner * rank, 2.0 * (rows * inner + rank * inner + rows * rank))


def quantize(size: Size, rank: int, value_bytes: float = 1.0) -> Work:
    """Return smoothing, subtracting hidden · deflationᵀ and the offset, and rounding: x in 16 bits
    in, values out.
    """
    rows, inner, _ = size
    return Work.of("bf16", 2.0 * rows * inner * rank, (2.0 + value_bytes) * rows * inner + 2.0 * (rows + inner) * rank)


def expand(size: Size, weight_bytes: float, value_bytes: float = 1.0) -> Work:
    """Return a weight's way from four bits to what the product reads. weight_bytes: of a stored
    weight.
    """
    return Work.moving((weight_bytes + value_bytes) * size.in_features * size.out_features)


def multiply(size: Size, rank: int, operand: Operand, value_bytes: float = 1.0) -> Work:
    """Return the product with branch and bias in its epilogue: y in 16 bits."""
    rows, inner, outer = size
    moved = value_bytes * (rows * inner + inner * outer) + 2.0 * rows * outer + 2.0 * (rows + outer) * rank
    return Work.of(operand, 2.0 * rows * inner * outer, moved)


def quantizing_input(entry: LayerEntry, size: Size, backend: Backend) -> list[Work]:
    """Return what is done once for linears that share an input."""
    if entry.weights_alone:
        return []
    projected = [project(size, entry.rank)] if entry.rank else []
    deflating = entry.rank if entry.deflated else 0
    return [*projected, quantize(size, deflating, _value_bytes(entry.format, backend))]


def multiplying(entry: LayerEntry, size: Size, backend: Backend) -> list[Work]:
    """Return what is done for each linear, its input quantized."""
    if entry.weights_alone:
        backend = Backend.BF16
    value_bytes = _value_bytes(entry.format, backend)
    product = multiply(size, entry.rank, _OPERANDS[backend], value_bytes)
    return [product] if backend is Backend.FP4 else [expand(size, _weight_bytes(entry), value_bytes), product]


def _value_bytes(format: Format, backend: Backend) -> float:
    """Return the bytes of a number as the product reads it: one or two, or a code and its share of
    a scale.
    """
    if backend is Backend.FP4:
        return 0.5 + format.scale_grid.num_bytes / format.group_size
    return _VALUE_BYTES[backend]


def _weight_bytes(entry: LayerEntry) -> float:
    forms = stored_as(entry, 1)
    stored = sum(math.prod(forms[key].shape) for key in ("packed", "scale"))  # bytes, both
    return stored / (entry.in_features * entry.out_features)
