"""Our own quantizer under the peers' contract: quantized in memory, and judged by the same code."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.peers.job import STORE
from benchmarks.peers.wan_peer import Quantized, Storage, Task, run_peer
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sequential import quantize_denoiser
from tempoquant.calibrate.store import SampleStore, bins_of
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.source import SourceModel
from tempoquant.models.weights import DenoiserWeights
from tempoquant.recipe import Recipe
from tempoquant.runtime.convert import install_layers


def quantize(task: Task) -> Quantized:
    """Quantize one denoiser from the sample store that the calibration files were copied from."""
    job, row, denoiser = task.job, task.row, task.denoiser
    recipe = Recipe.load(row.name.split("-")[2]).replace(format=row.format)
    if row.rank is not None:
        recipe = recipe.replace(rank=row.rank)
    store = SampleStore.open(job.work / STORE)
    bins = bins_of(store, recipe, denoiser)
    weights = ReplayedDenoiser(DenoiserWeights(SourceModel.open(job.model), denoiser, torch.float32, "cpu"))
    with TemporaryDirectory() as scratch:
        blocks = quantize_denoiser(weights, store.samples(denoiser), recipe, bins, HiddenStates(Path(scratch)))
        layers = {named.name: named.layer for block in blocks for named in block.layers}
    install_layers(task.model, layers, bins)
    num_bits = 8 * sum(layer.num_bytes for layer in layers.values())
    num_weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    return Quantized(task.model, Storage(num_bits, num_weights), batched=False)


if __name__ == "__main__":
    run_peer(quantize, ["tempoquant"])
