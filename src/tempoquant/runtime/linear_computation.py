"""The computation of a QuantizedLinear: by a tape if one can be played, else by kernels or in plain
PyTorch.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from tempoquant.input_transform import InputTransform
from tempoquant.kernels import operators
from tempoquant.kernels.dispatch import Backend
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors, w4a4_linear
from tempoquant.kernels.weights_alone import multiply_weights_alone
from tempoquant.runtime.by_tape import forward_by_tape

if TYPE_CHECKING:
    from tempoquant.runtime.linear import QuantizedLinear


class _Run(NamedTuple):
    """One computation: the rows of a batch that have the same tensors.

    Attributes:
        x: (rows, …, in).
        clip_ratio: as from `BinClock.select`.
        eight_bits: as from `BinClock.eight_bits`.
    """

    x: torch.Tensor
    transform: InputTransform
    weight: WeightTensors
    clip_ratio: torch.Tensor
    eight_bits: torch.Tensor | None


def compute(linear: "QuantizedLinear", x: torch.Tensor) -> torch.Tensor:
    """Compute a layer outside of autocast: (batch, …, in) to (batch, …, out), in the dtype of x."""
    entry, device = linear.entry, x.device
    backend = operators.backend_of(device.type, device.index, entry.format.name)
    if entry.weights_alone:
        return multiply_weights_alone(x, linear.weight_tensors(), entry.format, backend)
    if backend == Backend.FP8 and not linear.fits_fp8:
        backend = Backend.BF16.value
    if backend == Backend.REFERENCE or x.dtype == torch.float64:
        return _together(
            [
                w4a4_linear(
                    run.x,
                    run.transform,
                    run.weight,
                    entry.format,
                    entry.activation_scale_rule,
                    run.clip_ratio,
                    False if run.eight_bits is None else run.eight_bits,
                )
                for run in _runs(linear, x)
            ]
        )
    y = None if torch.compiler.is_compiling() else forward_by_tape(linear, x, backend)
    return _by_kernels(linear, x, backend) if y is None else y


def _by_kernels(linear: "QuantizedLinear", x: torch.Tensor, backend: str) -> torch.Tensor:
    entry, runs = linear.entry, _runs(linear, x)

    def quantize(_: torch.Tensor) -> tuple[QuantizedInput, ...]:
        return tuple(
            operators.quantize_input(_source(linear, run), run.transform, entry.format, backend) for run in runs
        )

    if linear.shared_input is None:
        quantized = quantize(x)
    else:
        quantized = linear.shared_input.quantized(x, quantize, backend, linear.clock.call is not None)
    y = _together(
        [
            operators.multiply(each, run.weight, entry.format, x.dtype, backend)
            for each, run in zip(quantized, runs, strict=True)
        ]
    )
    return y.reshape(*x.shape[:-1], entry.out_features)


def _source(linear: "QuantizedLinear", run: _Run) -> operators.Source:
    flags = None if run.eight_bits is None else run.eight_bits.reshape(-1)
    rows = run.x.reshape(-1, linear.entry.in_features)
    return operators.Source(rows, linear.entry.activation_scale_rule, run.clip_ratio.reshape(-1), flags)


def _runs(linear: "QuantizedLinear", x: torch.Tensor) -> list[_Run]:
    """Split the batch into rows if tensors differ by timestep bin and each row has its timestep;
    else keep it whole.
    """
    clock = linear.clock
    clip_ratio, eight_bits = clock.select(linear.clip_ratio.view(torch.float32), x), clock.eight_bits(x)
    bins = clock.rows(x) if linear.keys_by_bin else None
    if bins is None or bins.shape[0] == 1:
        return [_Run(x, linear.input_transform(bins), linear.weight_tensors(bins), clip_ratio, eight_bits)]
    rows = [slice(row, row + 1) for row in range(bins.shape[0])]
    return [
        _Run(
            x[row],
            linear.input_transform(bins[row]),
            linear.weight_tensors(bins[row]),
            clip_ratio[row],
            None if eight_bits is None else eight_bits[row],
        )
        for row in rows
    ]


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
