"""One row and seed: quantize all denoisers, count their bytes, and measure their distance from 16
bits.
"""

import contextlib
import copy
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.quality.maps import LayerMap, layer_maps
from benchmarks.quality.reference import Reference, generate
from benchmarks.quality.task import Task
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sequential import quantize_denoiser
from tempoquant.calibrate.store import bins_of
from tempoquant.checkpoint.tensors import to_stored
from tempoquant.device import compute_dtype
from tempoquant.evaluate.noise_prediction import CallError, call_errors
from tempoquant.formats import Format
from tempoquant.hosts.diffusers.sampling import predict_noise
from tempoquant.kernels.reference import WeightTensors, dequantize_residual
from tempoquant.layer import QuantizedLayer
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.models.weights import DenoiserWeights
from tempoquant.progress import Progress
from tempoquant.recipe import Recipe
from tempoquant.runtime.activation_bits import set_activation_bits
from tempoquant.runtime.convert import install_layers
from tempoquant.sqnr import sqnr_db
from tempoquant.timesteps import TimestepBins

BITS_OF_16BIT = 16
MAX_REMEMBERED_WEIGHTS = 2**28
"""Linears of up to this many weights in all are dequantized once: a gibibyte in float32."""


@dataclass(frozen=True, eq=False)
class QuantizedDenoiser:
    """A quantized denoiser and its size.

    Attributes:
        layers: by name.
        bins: of all of them.
        num_bits: of all block linears.
        num_weights: of the same.
    """

    layers: Mapping[str, QuantizedLayer]
    bins: TimestepBins
    num_bits: int
    num_weights: int


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of one row and seed.

    Attributes:
        bits_per_weight: of all linears of all denoisers' blocks.
        seconds: to quantize all denoisers, by the clock.
        cpu_seconds: the same, of the processor, which is valid on a busy machine too.
        sqnr_db: of the noise prediction, one value a held-out prompt (the mean over its calls); by
            denoiser, such as "low_noise", and by timestep bin of the paper recipe, such as
            "low_noise bin 0".
        final_latent_db: SQNR of the final latent of each held-out generation.
        maps: by denoiser.
        final_latents: (prompts, channels, frames, height, width).
    """

    bits_per_weight: float
    seconds: float
    cpu_seconds: float
    sqnr_db: Mapping[str, Sequence[float]]
    final_latent_db: Sequence[float]
    maps: Mapping[str, LayerMap]
    final_latents: torch.Tensor


def measure(
    pipeline: Any,
    reference: Reference,
    recipe: Recipe | None,
    progress: Progress,
    eight_bit_timesteps: tuple[float, float] | None = None,
) -> Measured:
    """Quantize by a resolved recipe and judge; None judges the 16-bit pipeline itself.

    Args:
        pipeline: 16-bit; unchanged afterwards.
        eight_bit_timesteps: the timesteps with 8-bit activations while it is judged.

    Raises TempoQuantError as quantizing and judging do.
    """
    task = reference.task
    start, cpu_start = time.perf_counter(), time.process_time()
    denoisers = (
        {}
        if recipe is None
        else {denoiser: quantize(task, reference, recipe, denoiser, progress) for denoiser in COMPONENTS}
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    bins = judging_bins(reference)
    errors: list[CallError] = []
    latents, latent_errors = [], []
    maps: Mapping[str, LayerMap] = {}
    advance = progress.start("Judging", len(task.held_out))
    with installed(pipeline, denoisers) as transformers, dequantizing_once(denoisers):
        if eight_bit_timesteps is not None:
            set_activation_bits(pipeline, 8, eight_bit_timesteps)
        for trajectory in reference.trajectories():
            if not maps:  # the first prompt's inputs are enough for single layers
                maps = layer_maps(task.source.family, transformers, trajectory.calls, bins)
            errors += call_errors(lambda sample: predict_noise(pipeline, sample), trajectory.calls)
            latent = generate(task, pipeline, trajectory.prompt, trajectory.seed)
            latents.append(latent)
            latent_errors.append(sqnr_db(trajectory.final_latent, latent))
            advance()
    return Measured(
        bits_per_weight(denoisers),
        seconds,
        cpu_seconds,
        by_prompt(errors, bins),
        latent_errors,
        maps,
        torch.cat(latents),
    )


def quantize(task: Task, reference: Reference, recipe: Recipe, denoiser: str, progress: Progress) -> QuantizedDenoiser:
    """Quantize one denoiser from its files and the seed's calibration samples."""
    bins = bins_of(reference.store, recipe, denoiser)
    samples = reference.store.samples(denoiser) if recipe.needs_calibration else []
    weights = DenoiserWeights(task.source, denoiser, compute_dtype(task.device), task.device)
    with tempfile.TemporaryDirectory() as scratch:
        states = HiddenStates(Path(scratch))
        blocks = quantize_denoiser(ReplayedDenoiser(weights), samples, recipe, bins, states, progress=progress)
        layers = {named.name: named.layer for block in blocks for named in block.layers}
    linears = task.source.linears(denoiser)
    num_weights = {name: linear.out_features * linear.in_features for name, linear in linears.items()}
    num_bits = sum(
        8 * num_stored_bytes(layers[name], had_bias=f"{name}.bias" in weights)
        if name in layers
        else BITS_OF_16BIT * count
        for name, count in num_weights.items()
    )
    return QuantizedDenoiser(layers, bins, num_bits, sum(num_weights.values()))


def num_stored_bytes(layer: QuantizedLayer, had_bias: bool) -> int:
    """Count every byte that a checkpoint stores in place of a 16-bit weight; a bias counts if the
    16-bit layer had none.
    """
    stored = sum(tensor.nbytes for tensor in to_stored(layer, "the layer").values())
    bias = layer.at_bin(0).bias
    return stored - (bias.nbytes if had_bias and bias is not None else 0)


def bits_per_weight(denoisers: Mapping[str, QuantizedDenoiser]) -> float:
    """Compute the bits a weight of all linears of all denoisers' blocks; 16-bit ones count as
    such.
    """
    if not denoisers:
        return float(BITS_OF_16BIT)
    return sum(e.num_bits for e in denoisers.values()) / sum(e.num_weights for e in denoisers.values())


@contextlib.contextmanager
def installed(pipeline: Any, denoisers: Mapping[str, QuantizedDenoiser]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Make the pipeline compute in four bits within this context. Yields the 16-bit and the 4-bit
    transformer of each.
    """
    originals = {denoiser: getattr(pipeline, COMPONENTS[denoiser]) for denoiser in denoisers}
    try:
        pairs = {}
        for denoiser, original in originals.items():
            # The copy has its own modules, and shares the parameters.
            shared = {id(parameter): parameter for parameter in original.parameters()}
            quantized = copy.deepcopy(original, shared)
            install_layers(quantized, denoisers[denoiser].layers, denoisers[denoiser].bins)
            setattr(pipeline, COMPONENTS[denoiser], quantized)
            pairs[denoiser] = (original, quantized)
        yield pairs
    finally:
        for denoiser, original in originals.items():
            setattr(pipeline, COMPONENTS[denoiser], original)


@contextlib.contextmanager
def dequantizing_once(denoisers: Mapping[str, QuantizedDenoiser]) -> Iterator[None]:
    """Keep small models' dequantized weights between calls within this context: a third of the
    time, same bits.
    """
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def remembered(weight: WeightTensors, format: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        where = weight.packed.data_ptr()
        if where not in known:  # with its memory, which must not become another layer's
            known[where] = (weight.packed, dequantize_residual(weight, format, dtype))
        return known[where][1].to(dtype)

    if sum(denoiser.num_weights for denoiser in denoisers.values()) > MAX_REMEMBERED_WEIGHTS:
        yield
        return
    with mock.patch("tempoquant.kernels.reference.dequantize_residual", remembered):
        yield


def judging_bins(reference: Reference) -> dict[str, TimestepBins]:
    """Return the paper recipe's timestep bins: every row is judged on the same ones, whatever its
    own bins are.
    """
    paper = Recipe.load("paper")
    return {
        denoiser: TimestepBins.from_step_fractions(reference.store.schedule(denoiser), paper.bin_fractions_of(denoiser))
        for denoiser in COMPONENTS
    }


def by_prompt(errors: Sequence[CallError], bins: Mapping[str, TimestepBins]) -> dict[str, list[float]]:
    """Average the SQNR of each prompt's calls, in the order of the prompts: by denoiser, then by
    denoiser and timestep bin.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for error in errors:
        denoiser = error.denoiser
        for key in (denoiser, f"{denoiser} bin {bins[error.denoiser].of(error.timestep)}"):
            found.setdefault(key, {}).setdefault(error.prompt_id, []).append(error.sqnr_db)
    return {key: [sum(v) / len(v) for v in prompts.values()] for key, prompts in sorted(found.items())}
