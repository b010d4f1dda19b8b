"""Maps of a recipe's error: clip ratio and output error of every layer in every timestep bin."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from tempoquant.calibrate.capture import watching_inputs
from tempoquant.calibrate.sample import RecordedCall
from tempoquant.models.denoiser_inputs import on_device
from tempoquant.models.family import ModelFamily
from tempoquant.runtime.convert import quantized_linears
from tempoquant.timesteps import TimestepBins


class LayerMap(NamedTuple):
    """One denoiser's layers by timestep bins.

    Attributes:
        layers: names.
        edges: of the bins, timesteps.
        clip_ratio: (layers, bins), mean over the bin's calls.
        sqnr_db: (layers, bins), output of the 4-bit linear against the 16-bit one's, both on the
            16-bit model's inputs. NaN in bins without a call.
    """

    layers: list[str]
    edges: list[float]
    clip_ratio: list[list[float]]
    sqnr_db: list[list[float]]


@torch.no_grad()
def layer_maps(
    family: ModelFamily,
    transformers: Mapping[str, tuple[Any, Any]],
    calls: Sequence[RecordedCall],
    bins: Mapping[str, TimestepBins],
) -> dict[str, LayerMap]:
    """Run the 16-bit transformers on one trajectory's conditional calls, every 4-bit linear beside
    the 16-bit one.

    Args:
        family: of the transformers.
        transformers: 16-bit and 4-bit transformer of each denoiser.
        calls: of one generation.
        bins: to sort the calls into.
    """
    maps = {}
    for denoiser, (original, quantized) in transformers.items():
        watch = _Watch(original, quantized, bins[denoiser])
        for sample in (call.sample for call in calls):
            if sample.denoiser == denoiser and sample.guidance_branch == "conditional":
                watch.timestep = sample.timestep
                with watching_inputs(watch.linears, watch.observe):
                    original(**on_device(original, family, sample.inputs), return_dict=False)
        maps[denoiser] = watch.map()
    return maps


class _Watch:
    """Sums, per layer and bin, over the calls of one denoiser."""

    def __init__(self, original: Any, quantized: Any, bins: TimestepBins) -> None:
        self.timestep = 0.0
        self._bins = bins
        self._quantized = quantized_linears(quantized)
        self.linears = {name: original.get_submodule(name) for name in self._quantized}
        # Of each layer and bin: signal power, error power, clip ratios, calls.
        self._sums = torch.zeros(4, len(self.linears), bins.num_bins, dtype=torch.float64)

    def observe(self, name: str, x: torch.Tensor) -> None:
        """Add the input of a 16-bit linear, (…, in)."""
        linear, layer = self.linears[name], self._quantized[name]
        # Not linear(x), which would be watched in its turn.
        wanted = functional.linear(x, linear.weight, linear.bias).double()
        with layer.at_timestep(self.timestep):
            clip_ratio = layer.clock.select(layer.to_layer().clip_ratio, x).mean()
            error = layer(x).double() - wanted
        found = torch.stack([wanted.square().sum(), error.square().sum(), clip_ratio, torch.ones_like(clip_ratio)])
        self._sums[:, list(self.linears).index(name), self._bins.of(self.timestep)] += found.double().cpu()

    def map(self) -> LayerMap:
        """Return the sums as a map."""
        signal, error, clip_ratio, num_calls = self._sums
        sqnr_db = 10 * torch.log10(signal / error)
        return LayerMap(list(self.linears), list(self._bins.edges), (clip_ratio / num_calls).tolist(), sqnr_db.tolist())


def mean_map(maps: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """Average one denoiser's maps over seeds, as plain values (layers, bins); NaN for a bin without
    a call.
    """
    values = [torch.tensor([[float(cell) for cell in row] for row in found[key]]) for found in maps]
    return torch.stack(values).mean(0).tolist()


def bin_names(edges: Sequence[float]) -> list[str]:
    """Return names such as "t < 620", from the cleanest bin to the noisiest."""
    if not edges:
        return ["all t"]
    inner = [f"{low:.0f} ≤ t < {high:.0f}" for low, high in itertools.pairwise(edges)]
    return [f"t < {edges[0]:.0f}", *inner, f"t ≥ {edges[-1]:.0f}"]
