"""Quantize an expert block by block, so that memory follows the size of one block and never their number."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from tempoquant.calibrate.capture import watching_inputs
from tempoquant.calibrate.linear_calibration import LinearCalibration, Phase, phases_of
from tempoquant.calibrate.sample import CalibrationSample, CalibrationSet
from tempoquant.errors import CalibrationError
from tempoquant.layer import QuantizedLayer
from tempoquant.progress import SILENT, Progress
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert, TimestepBins

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


class ExpertModel(Protocol):
    """What calibration must know of a model. A new model satisfies this and nothing else."""

    expert: Expert
    num_blocks: int

    def first_block_call(self, sample: CalibrationSample) -> BlockCall:
        """Run everything before the first block; the arguments the block would be called with."""

    def block(self, index: int) -> nn.Module:
        """One block, on the device and in the dtype calibration computes in."""

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of one block that may be quantized, by their full name in the expert."""

    def next_block_call(self, call: BlockCall, output: torch.Tensor) -> BlockCall:
        """The arguments of the following block, given this block's output."""


class NamedLayer(NamedTuple):
    """name: in the expert. layer: what replaces it. needed_float64: its Hessian was too ill-conditioned for float32."""

    name: str
    layer: QuantizedLayer
    needed_float64: bool


class _Pending(NamedTuple):
    """One sample between two blocks."""

    call: BlockCall
    timestep_bin: int


_SOURCE = {Phase.RANGE: "statistics", Phase.HESSIAN: "statistics", Phase.CLIP: "clip_search"}


@torch.no_grad()
def quantize_expert(
    model: ExpertModel,
    samples: CalibrationSet,
    recipe: Recipe,
    bins: TimestepBins,
    progress: Progress = SILENT,
) -> Iterator[NamedLayer]:
    """Yield every quantized layer of an expert, in order of its blocks.

    Each block is calibrated on the outputs of the *16-bit* blocks before it.

    Args:
        model: the 16-bit expert.
        samples: recorded calls; only those of this expert are read.
        recipe: what to do.
        bins: timestep bins of this expert.

    Raises:
        CalibrationError, HessianError, ModelError, RecipeError: naming the layer.
    """
    phases = phases_of(recipe)
    own = samples.of(model.expert)
    sources = {_SOURCE[phase] for phase in phases}
    pending = {source: _start(model, getattr(own, source), bins) for source in sorted(sources)}
    units = model.num_blocks * max(1, sum(len(pending[_SOURCE[phase]]) for phase in phases))
    advance = progress.start(f"Quantizing {model.expert.value}", units)
    for index in range(model.num_blocks):
        linears = _calibrations(model, index, recipe, bins)
        outputs = {}
        for phase in phases:
            source = _SOURCE[phase]
            watched = {name: module for name, module in model.linears(index).items() if name in linears}
            outputs[source] = _watch_block(model.block(index), watched, linears, phase, pending[source], advance)
            for calibration in linears.values():
                calibration.settle(phase)
        for name, calibration in linears.items():
            yield NamedLayer(name, calibration.finish(), calibration.needed_float64)
        for source, results in outputs.items():
            pending[source] = [
                _Pending(model.next_block_call(waiting.call, output), waiting.timestep_bin)
                for waiting, output in zip(pending[source], results, strict=True)
            ]
        if not phases:
            advance()


def _start(model: ExpertModel, samples: Sequence[CalibrationSample], bins: TimestepBins) -> list[_Pending]:
    if not samples:
        raise CalibrationError(
            f"no calibration sample belongs to the {model.expert.value} expert: calibrate with more steps."
        )
    return [_Pending(model.first_block_call(sample), bins.of(sample.timestep)) for sample in samples]


def _calibrations(model: ExpertModel, index: int, recipe: Recipe, bins: TimestepBins) -> dict[str, LinearCalibration]:
    """The linears of a block that the recipe quantizes, ready to watch."""
    chosen = {}
    for name, linear in model.linears(index).items():
        format = recipe.format_of(name, model.expert, index, model.num_blocks)
        if format is not None:
            chosen[name] = LinearCalibration(name, linear.weight, linear.bias, format, recipe, bins)
    return chosen


def _watch_block(
    block: nn.Module,
    modules: Mapping[str, nn.Module],
    linears: Mapping[str, LinearCalibration],
    phase: Phase,
    pending: Sequence[_Pending],
    advance: Callable[[], None],
) -> list[torch.Tensor]:
    """Run a block on every waiting sample while its linears watch; the block's outputs."""
    current_bin = 0

    def observe(name: str, x: torch.Tensor) -> None:
        linears[name].observe(phase, x, current_bin)

    outputs = []
    with watching_inputs(modules, observe):
        for waiting in pending:
            current_bin = waiting.timestep_bin
            args, kwargs = waiting.call
            outputs.append(block(*args, **kwargs))
            advance()
    return outputs
