"""Maps of a model's error: output error and clip ratio of every 4-bit linear in every timestep bin.

A quantized denoiser repeats recorded calls of the reference. Each linear is judged on the input
that it gets there, against the product of that input with the 16-bit weight, which is read from the
reference's files each time. The loss of 8-bit attention stands beside them, by a model of it: the
calls themselves keep 16-bit attention.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from tempoquant.calibrate.capture import watching_outputs
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.device import compute_dtype
from tempoquant.evaluate.eight_bit_attention import watching_attention
from tempoquant.models.denoiser_inputs import on_device
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.progress import SILENT, Progress
from tempoquant.runtime.convert import quantized_linears
from tempoquant.timesteps import TimestepBins

TOKENS_AT_ONCE = 4096
"""Rows of an output that are compared at once, which bounds memory."""


@torch.no_grad()
def layer_maps(
    pipeline: Any,
    reference: SourceModel,
    calls: Sequence[CalibrationSample],
    bins: Mapping[str, TimestepBins],
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Map each quantized denoiser: {"layers", "bins", "error_db", "clip_ratio"}, the last two
    (layers, bins).

    "attention" is {"layers", "error_db"} of its attention in 8 bits, see `watching_attention`.
    "bins" are pairs of timesteps; the outermost are the ends of the denoiser's range. error_db is
    10·log₁₀(error power / signal power), lower is better; None in bins without a call.

    Args:
        pipeline: quantized.
        reference: the 16-bit pipeline it was made from.
        calls: of the reference.
        bins: to sort the calls into.

    Raises:
        ModelError: the reference's weights cannot be read.
    """
    maps = {}
    device = pipeline._execution_device  # in a memory mode the weights may be elsewhere
    on_call = progress.start("Layer maps", len(calls))
    for denoiser in reference.denoisers:
        name, transformer = denoiser.name, getattr(pipeline, denoiser.component)
        own_calls = [call for call in calls if call.denoiser == name]
        if linears := quantized_linears(transformer):
            weights = DenoiserWeights(reference, name, compute_dtype(str(device)), str(device))
            watch, attention = _Watch(linears, weights, bins[name]), _AttentionErrors(bins[name].num_bins)
            for call in own_calls:
                watch.bin = attention.bin = bins[name].of(call.timestep)
                with watching_outputs(linears, watch.observe), watching_attention(transformer, attention.observe):
                    transformer(**on_device(transformer, reference.family, call.inputs, device), return_dict=False)
                on_call()
            maps[name] = {**watch.map(*denoiser.timesteps), "attention": attention.map()}
        else:
            for _ in own_calls:
                on_call()
    return maps


class _Watch:
    """Sums, per layer and bin, over the calls of one denoiser."""

    def __init__(self, linears: Mapping[str, Any], weights: DenoiserWeights, bins: TimestepBins) -> None:
        self.bin = 0
        self._linears, self._weights, self._bins = linears, weights, bins
        # For each layer and bin: signal power, error power, clip ratios, calls.
        self._sums = torch.zeros(4, len(linears), bins.num_bins, dtype=torch.float64)
        self._index = {name: index for index, name in enumerate(linears)}

    def observe(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add one call of a 4-bit linear: (…, in) and (…, out)."""
        layer = self._linears[name]
        ratios = layer.clip_ratio.view(torch.float32)
        ratio = (ratios if layer.entry.weights_alone else layer.clock.select(ratios, x)).mean()
        weight = self._read(f"{name}.weight", x)
        bias = self._read(f"{name}.bias", x) if f"{name}.bias" in self._weights else None
        signal = error = torch.zeros((), dtype=torch.float64, device=x.device)
        rows = zip(x.flatten(0, -2).split(TOKENS_AT_ONCE), y.flatten(0, -2).split(TOKENS_AT_ONCE), strict=True)
        for inputs, outputs in rows:
            wanted = functional.linear(inputs, weight, bias).float()
            signal = signal + wanted.square().sum(dtype=torch.float64)
            error = error + (outputs.float() - wanted).square().sum(dtype=torch.float64)
        found = torch.stack([signal, error, ratio.to(signal), torch.ones_like(signal)])
        self._sums[:, self._index[name], self.bin] += found.cpu()

    def _read(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._weights.read(name).to(x.device, x.dtype)

    def map(self, lowest: float, highest: float) -> dict[str, Any]:
        """Return the sums; the outermost bins, which are unbounded, end at these timesteps."""
        signal, error, ratio, num_calls = self._sums
        limits = [lowest, *self._bins.edges, highest]
        return {
            "layers": list(self._linears),
            "bins": [list(pair) for pair in itertools.pairwise(limits)],
            "error_db": _finite(10 * torch.log10(error / signal)),
            "clip_ratio": _finite(ratio / num_calls),
        }


class _AttentionErrors:
    """Sums, per attention and bin, of the changes by 8 bits."""

    def __init__(self, num_bins: int) -> None:
        self.bin = 0
        self._num_bins = num_bins
        self._sums: dict[str, torch.Tensor] = {}

    def observe(self, name: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """Add one attention."""
        sums = self._sums.setdefault(name, torch.zeros(2, self._num_bins, dtype=torch.float64))
        powers = [each.square().sum(dtype=torch.float64) for each in (wanted, found - wanted)]
        sums[:, self.bin] += torch.stack(powers).cpu()

    def map(self) -> dict[str, Any]:
        """Return the sums, by the names of attention modules and of their number formats."""
        found = torch.stack(list(self._sums.values())) if self._sums else torch.zeros(0, 2, self._num_bins)
        return {"layers": list(self._sums), "error_db": _finite(10 * torch.log10(found[:, 1] / found[:, 0]))}


def _finite(values: torch.Tensor) -> list[list[float | None]]:
    """Return rows of numbers; None for numbers that are not finite (no call, or no error at
    all).
    """
    finite: Iterable[tuple[list[float], list[bool]]] = zip(
        values.tolist(), torch.isfinite(values).tolist(), strict=True
    )
    return [[value if ok else None for value, ok in zip(row, oks, strict=True)] for row, oks in finite]
