"""The short way through a 4-bit linear: its two halves are played from tapes (`kernels.tape`)."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.kernels import operators
from tempoquant.kernels.quantized_input import QuantizedInput

if TYPE_CHECKING:
    from tempoquant.runtime.linear import QuantizedLinear


class Kind:
    """Stands for all layers whose tensors have the same shapes and dtypes; compared by identity."""

    def __init__(self, entry: LayerEntry, num_bins: int) -> None:
        self._entry, self._num_bins = entry, num_bins

    def __reduce__(self) -> tuple[Any, ...]:
        return kind_of, (self._entry, self._num_bins)


@functools.cache
def kind_of(entry: LayerEntry, num_bins: int) -> Kind:
    """Return the one Kind of such layers in this process, copies of a layer included."""
    return Kind(entry, num_bins)


class _Way(NamedTuple):
    """Says how one input goes through a layer.

    Attributes:
        taped: `tape.taped`.
        key: of its tapes.
        backend: as `operators.backend_of` names it.
        bins: (1 or batch,) int64, or None with a single bin.
        flags: (1 or batch,) bool, which rows have 8-bit activations; None for none.
    """

    taped: Callable[..., Any]
    key: tuple[Any, ...]
    backend: str
    bins: torch.Tensor | None
    flags: torch.Tensor | None


def forward_by_tape(linear: "QuantizedLinear", x: torch.Tensor, backend: str) -> torch.Tensor | None:
    """Return what `linear` gives for x (batch, …, in), bit for bit; None if there is no short way.

    There is none where rows of the batch have tensors of different timestep bins, for an x with
    gaps, and where `tape.situation` says so.
    """
    tapes = operators.tapes()
    situation = tapes.situation(x)
    if situation is None or not x.is_contiguous():
        return None
    bins, flags = linear.clock.rows(x), linear.clock.eight_bits(x)
    if bins is not None and linear.keys_by_bin and bins.shape[0] > 1:
        return None
    if flags is not None:
        flags = flags.reshape(-1)
    has = (None if bins is None else bins.shape[0], None if flags is None else flags.shape[0])
    way = _Way(tapes.taped, (linear.kind, backend, situation, has), backend, bins, flags)
    if linear.shared_input is None:
        quantized = _quantize(linear, x, way)
    else:
        (quantized,) = linear.shared_input.quantized(
            x, lambda x: (_quantize(linear, x, way),), backend, linear.clock.call is not None
        )
    return _multiply(linear, x, quantized, way)


def _quantize(linear: "QuantizedLinear", x: torch.Tensor, way: _Way) -> QuantizedInput:
    x = x.view(-1, linear.in_features)
    stored = linear._parameters
    down, clip_ratio = stored["down"], linear.clip_ratio
    hidden = None if down is None else operators.branch_hidden(x, down)
    if way.bins is not None:
        clip_ratio = clip_ratio.view(torch.float32)[way.bins]
    deflation, input_offset = _of_bin(linear, "deflation", way), _of_bin(linear, "input_offset", way)

    def round_input() -> QuantizedInput:
        source = operators.Source(x, linear.entry.activation_scale_rule, clip_ratio.view(torch.float32), way.flags)
        transform = linear.transform_with(
            _first(linear, "deflation", deflation), _first(linear, "input_offset", input_offset)
        )
        return operators.round_input(source, hidden, transform, linear.entry.format, way.backend)

    given = (x, hidden, stored["smoothing_factor"], clip_ratio, deflation, input_offset, way.flags)
    made: QuantizedInput = way.taped((way.key, "round_input"), given, round_input)
    return made


def _multiply(linear: "QuantizedLinear", x: torch.Tensor, quantized: QuantizedInput, way: _Way) -> torch.Tensor:
    stored = linear._parameters
    up, bias = _of_bin(linear, "up", way), _of_bin(linear, "bias", way)

    def multiply() -> torch.Tensor:
        weight = linear.weight_with(_first(linear, "up", up), _first(linear, "bias", bias))
        return operators.multiply(quantized, weight, linear.entry.format, x.dtype, way.backend)

    given = (*quantized, stored["packed"], stored["scale"], stored["tensor_scale"], up, bias)
    y: torch.Tensor = way.taped((way.key, "multiply"), given, multiply)
    return y.view(*x.shape[:-1], linear.out_features)


def _of_bin(linear: "QuantizedLinear", key: str, way: _Way) -> torch.Tensor | None:
    """Return a stored tensor; one by bin keeps its first dimension, cut to the current bin."""
    stored = linear._parameters[key]
    if stored is None or way.bins is None or key not in linear.keys_by_bin:
        return stored
    return stored.index_select(0, way.bins)


def _first(linear: "QuantizedLinear", key: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor[0] if tensor is not None and key in linear.keys_by_bin else tensor
