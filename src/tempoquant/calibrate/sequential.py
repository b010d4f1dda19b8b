"""Quantization of a denoiser block by block, so that memory follows the size of one block, not
their number.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from tempoquant.calibrate.capture import computing_with, watching_inputs
from tempoquant.calibrate.denoiser_model import (
    Choice,
    DenoiserModel,
    for_weights_alone,
    linear_groups,
    linear_of,
    modulation_groups,
)
from tempoquant.calibrate.freed_memory import give_back_freed_memory
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.linear_calibration import InputCalibration
from tempoquant.calibrate.named_layer import NamedLayer
from tempoquant.calibrate.phases import Phase, phases_of
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.stopwatch import Stopwatch
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.errors import CalibrationError
from tempoquant.kernels.reference import w4a4_linear
from tempoquant.kernels.weights_alone import weights_alone_linear
from tempoquant.layer import QuantizedLayer
from tempoquant.methods.products import linear
from tempoquant.progress import SILENT, Progress
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins


@dataclass(frozen=True)
class QuantizedBlock:
    """A finished block.

    Attributes:
        index: of the block.
        layers: the replacements of its linears.
        seconds: time by stage.
    """

    index: int
    layers: list[NamedLayer]
    seconds: Mapping[str, float]


class _SampleCall(NamedTuple):
    """One sample without its hidden states, which are on disk between two blocks."""

    number: int
    timestep_bin: int
    in_statistics: bool


@torch.no_grad()
def quantize_denoiser(
    model: DenoiserModel,
    samples: Sequence[CalibrationSample],
    recipe: Recipe,
    bins: TimestepBins,
    states: HiddenStates,
    first_block: int = 0,
    chunks: TokenChunks | None = None,
    progress: Progress = SILENT,
) -> Iterator[QuantizedBlock]:
    """Yield the quantized layers of a denoiser, block after block. Ask for the next block once
    these are saved.

    Args:
        model: the 16-bit denoiser.
        samples: recorded calls of this denoiser, read one at a time.
        recipe: the settings.
        bins: timestep bins of this denoiser.
        states: holds hidden states between blocks.
        first_block: the first block that is not finished yet; its hidden states must be in
            `states`, if it is not 0.
        chunks: how many tokens are processed at once.

    Raises:
        CalibrationError, HessianError, ModelError, RecipeError, OutputError: naming the layer or
            file.
    """
    run = _DenoiserRun(model, recipe, bins, states, chunks or TokenChunks())
    with run.started(samples, first_block, progress):
        for index in range(first_block, model.num_blocks):
            yield run.quantize_block(index)
            states.keep_only(index + 1)


class _DenoiserRun:
    """The constants of a run from block to block."""

    def __init__(
        self, model: DenoiserModel, recipe: Recipe, bins: TimestepBins, states: HiddenStates, chunks: TokenChunks
    ) -> None:
        self._model, self._recipe, self._bins = model, recipe, bins
        self._states, self._chunks = states, chunks
        self._phases = phases_of(recipe)
        self._samples: Sequence[CalibrationSample] = ()
        self._calls: list[_SampleCall] = []
        self._advance: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def started(self, samples: Sequence[CalibrationSample], first_block: int, progress: Progress) -> Iterator[None]:
        """Allow blocks to be quantized within this context, from `first_block` on."""
        if self._phases:
            self._take_samples(samples, first_block)
        blocks = range(first_block, self._model.num_blocks)
        units = sum(self._num_passes(i) * len(self._calls) + sum(map(len, self._groups(i))) for i in blocks)
        if units:
            self._advance = progress.start(f"Quantizing {self._model.denoiser}", units)
        with self._model.running(samples) if self._phases else contextlib.nullcontext():
            yield

    def quantize_block(self, index: int) -> QuantizedBlock:
        """Quantize one block and return its layers; the hidden states before the next block are
        made on the way.
        """
        watch = Stopwatch()
        is_last = index + 1 == self._model.num_blocks
        with contextlib.ExitStack() as stack:
            with watch("read weights"):
                block = stack.enter_context(self._model.block(index))
                watch.device = next(block.parameters()).device
                calibrations = self._calibrations(index, block)
            for number, phase in enumerate(self._phases if self._num_passes(index) else ()):
                makes_states = number == 0 and not self._runs_quantized and not is_last
                with watch(phase.value), self._watching(phase, block, calibrations) as begin, _fast_linears(block):
                    self._run_samples(index, block, begin, makes_states)
                with watch("smoothing, branch, rounding"):
                    for calibration in calibrations.values():
                        calibration.end_phase(phase)
            layers = []
            for names in list(calibrations):
                self._let_go(index, block, calibrations)
                layers += calibrations.pop(names).finish(watch)
                give_back_freed_memory()
                for _ in names:
                    self._advance()
            if self._runs_quantized and not is_last:
                with watch("quantized outputs"), self._computing_quantized(index, block, layers) as begin:
                    self._run_samples(index, block, begin, makes_states=True)
        if self._phases and not is_last:
            self._states.commit(index + 1)
        return QuantizedBlock(index, layers, watch.seconds)

    def _let_go(self, index: int, block: nn.Module, needed: Iterable[tuple[str, ...]]) -> None:
        """Give back the weights of all of a block's linears but the needed ones, unless the block
        runs once more.
        """
        if self._runs_quantized:
            return
        kept = {name for group in needed for name in group}
        linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        self._model.let_go(index, [name for name in linears if name not in kept])

    @property
    def _runs_quantized(self) -> bool:
        return bool(self._phases) and self._recipe.block_inputs == "quantized"

    def _take_samples(self, samples: Sequence[CalibrationSample], first_block: int) -> None:
        both = self._recipe.statistics_branches == "both"
        if first_block and not self._states.exist_before(first_block):
            raise CalibrationError(
                f"the hidden states before block {first_block} of {self._model.denoiser} are gone: "
                "start over with --overwrite."
            )
        self._samples = samples
        for number, sample in enumerate(samples):
            in_statistics = both or sample.guidance_branch == "conditional"
            self._calls.append(_SampleCall(number, self._bins.of(sample.timestep), in_statistics))
        self._require_samples()

    def _require_samples(self) -> None:
        denoiser = self._model.denoiser
        if not any(call.in_statistics for call in self._calls):
            raise CalibrationError(f"no calibration sample belongs to {denoiser}: calibrate with more steps.")
        for timestep_bin, count in enumerate(self._calls_per_bin):
            if self._recipe.clip_ratios and not count:
                raise CalibrationError(
                    f"timestep bin {timestep_bin} of {self._bins.num_bins} of {denoiser} has no calibration sample: "
                    "record more samples per denoiser or more steps, or use fewer bins."
                )

    @property
    def _calls_per_bin(self) -> list[int]:
        seen = [call.timestep_bin for call in self._calls]
        return [seen.count(timestep_bin) for timestep_bin in range(self._bins.num_bins)]

    def _num_passes(self, index: int) -> int:
        """Return how often a block runs on every sample: not at all if it is the last and has
        nothing to quantize.
        """
        if index + 1 == self._model.num_blocks:
            return len(self._phases) if self._groups(index) else 0
        return len(self._phases) + self._runs_quantized

    def _groups(self, index: int) -> dict[tuple[str, ...], Choice]:
        return linear_groups(self._model, index, self._recipe) | modulation_groups(self._model, index, self._recipe)

    def _calibrations(self, index: int, block: nn.Module) -> dict[tuple[str, ...], InputCalibration]:
        found = {}
        for group, choice in self._groups(index).items():
            linears = {self._model.name_of(index, name): linear_of(block, name) for name in group}
            narrowest = min(linears.values(), key=lambda linear: linear.out_features)
            recipe = self._recipe.suited_to(narrowest.in_features, narrowest.out_features, self._bins.num_bins)
            if choice.weights_alone:
                recipe = for_weights_alone(recipe)
            found[group] = InputCalibration(
                linears,
                choice.format,
                recipe,
                self._bins,
                self._calls_per_bin,
                self._chunks,
                choice.rank,
                choice.weights_alone,
            )
        return found

    @contextlib.contextmanager
    def _watching(
        self, phase: Phase, block: nn.Module, calibrations: Mapping[tuple[str, ...], InputCalibration]
    ) -> Iterator[Callable[[_SampleCall], None]]:
        """Observe the linears' inputs within this context; call the yielded function before each
        sample.
        """
        current: list[_SampleCall] = []
        # One linear represents all that read the same input.
        watched = {names: block.get_submodule(names[0]) for names in calibrations}

        def observe(names: tuple[str, ...], x: torch.Tensor) -> None:
            calibrations[names].observe(phase, x, current[-1].timestep_bin, in_statistics=current[-1].in_statistics)

        with watching_inputs(watched, observe):
            yield current.append

    @contextlib.contextmanager
    def _computing_quantized(
        self, index: int, block: nn.Module, layers: Sequence[NamedLayer]
    ) -> Iterator[Callable[[_SampleCall], None]]:
        """Let the block compute with its 4-bit linears within this context; call the yielded
        function before each sample.
        """
        current: list[_SampleCall] = []
        by_name = {named.name: named.layer for named in layers}
        names = {each: self._model.name_of(index, each) for group in self._groups(index) for each in group}

        def compute(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
            if layer.weights_alone:
                return weights_alone_linear(x, layer.weight_tensors, layer.format)
            of_bin = layer.at_bin(current[-1].timestep_bin)
            rows = x.reshape(-1, x.shape[-1]).split(self._chunks.num_tokens)
            transform, weight, rule = of_bin.input_transform, of_bin.weight_tensors, of_bin.activation_scale_rule
            clip_ratio = float(of_bin.clip_ratio)
            results = [w4a4_linear(part, transform, weight, of_bin.format, rule, clip_ratio) for part in rows]
            return torch.cat(results).unflatten(0, x.shape[:-1])

        forwards = {
            block.get_submodule(each): functools.partial(compute, by_name[name])
            for each, name in names.items()
            if name in by_name
        }
        with computing_with(forwards):
            yield current.append

    def _run_samples(
        self, index: int, block: nn.Module, begin: Callable[[_SampleCall], None], makes_states: bool
    ) -> None:
        """Run a block on every sample, and keep the tensors carried past it as the hidden states
        before the next.
        """
        device = next(block.parameters()).device
        for call in self._calls:
            begin(call)
            before = self._states.read(index, call.number) if index else []  # no block runs before the first
            states = [each.to(device) for each in before]
            passed_on = self._model.run_block(index, self._samples[call.number], states)
            if makes_states:
                self._states.write(index + 1, call.number, passed_on)
            del states, passed_on
            give_back_freed_memory()
            self._advance()


def _fast_linears(block: nn.Module) -> AbstractContextManager[None]:
    """Run the block's linears at the processor's full speed within this context."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return computing_with({each: functools.partial(linear, weight=each.weight, bias=each.bias) for each in linears})
