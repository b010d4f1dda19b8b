"""Sensitivity: how much each linear's rounding adds to the error of the noise prediction, at each
rank (ours).

An error e of a linear's output, small and independent from entry to entry, moves the noise
prediction by J·e, whose power is Σ e² · (column of J)². One backward pass from random signs v gives
Jᵀ·v for every linear at once. The mean of its square over v is the squared column: Hutchinson
(1990), for the diagonal of Jᵀ·J. docs/method.md has the rest.

Blocks stream: they run forward once, and the states before each are kept. Then each block runs
again alone with autograd, in reverse order, so that memory follows the size of one block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tempoquant.calibrate.capture import watching_gradients, watching_inputs
from tempoquant.calibrate.denoiser_model import Choice, DenoiserModel, linear_groups, linear_of
from tempoquant.calibrate.freed_memory import give_back_freed_memory
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.phases import Phase
from tempoquant.calibrate.rank_trials import RankTrials
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.errors import CalibrationError
from tempoquant.progress import SILENT, Progress
from tempoquant.recipe import Recipe

MAX_SAMPLES = 8  # each has as many random signs as entries of its noise prediction, so few are enough
TOKENS_PER_SAMPLE = 512
RANKS = (0, 2, 4, 8, 16, 32, 64, 128)
MAX_RANK_SHARE = 0.25  # of a weight's smaller side: beyond it, 16 bits are the better choice
_SEED = 0


@dataclass(frozen=True)
class LayerSensitivity:
    """The sensitivity of one linear.

    Attributes:
        gain: relative error power of the noise prediction for error power 1 at every entry of the
            linear's output.
        errors: rank to the relative error power of the noise prediction that the linear's rounding
            alone adds.
    """

    gain: float
    errors: Mapping[int, float]


LinearsSensitivity = Mapping[str, LayerSensitivity]
"""The sensitivity of linears that get one rank together, by their names in the denoiser."""


def evenly_spaced(samples: Sequence[CalibrationSample], recipe: Recipe) -> list[CalibrationSample]:
    """Choose at most MAX_SAMPLES of a denoiser's samples, evenly spaced in the order of their
    timesteps.
    """
    seen = [
        number
        for number, sample in enumerate(samples)
        if recipe.statistics_branches == "both" or sample.guidance_branch == "conditional"
    ]
    spaced = torch.linspace(0, len(seen) - 1, min(MAX_SAMPLES, len(seen))).round().long().tolist()
    return [samples[seen[position]] for position in spaced]


def candidate_ranks(shapes: Sequence[torch.Size], recipe_rank: int) -> list[int]:
    """Return the ranks to try for weights (out, in) that get one rank together: feasible RANKS, and
    the recipe's own.
    """
    smaller_side = min(min(shape) for shape in shapes)
    within = {rank for rank in RANKS if rank <= MAX_RANK_SHARE * smaller_side}
    return sorted(within | {min(recipe_rank, smaller_side)})


def measure_denoiser(
    model: DenoiserModel,
    samples: Sequence[CalibrationSample],
    recipe: Recipe,
    states: HiddenStates,
    gradients: HiddenStates,
    chunks: TokenChunks | None = None,
    progress: Progress = SILENT,
) -> list[LinearsSensitivity]:
    """Measure every linear that the recipe quantizes.

    Args:
        model: the 16-bit denoiser.
        samples: recorded calls of this denoiser; all are used, see `evenly_spaced`.
        recipe: resolved.
        states: holds the hidden states before every block meanwhile.
        gradients: holds the gradients between two blocks.
        chunks: how many tokens are processed at once.

    Returns:
        The linears from the first block to the last, grouped if they get one rank together.

    Raises:
        CalibrationError, ModelError, RecipeError, OutputError: naming the layer or file.
    """
    if not samples:
        raise CalibrationError(f"no calibration sample belongs to {model.denoiser}: calibrate with more steps.")
    measurement = _Measurement(model, samples, recipe, states, gradients, chunks or TokenChunks())
    measurement.advance = progress.start(
        f"Measuring sensitivity of {model.denoiser}", (2 * model.num_blocks + 1) * len(samples)
    )
    with model.running(samples):
        measurement.run_forward()
        measurement.begin_backward()
        blocks = [measurement.run_backward(index) for index in reversed(range(model.num_blocks))]
    return [linears for block in reversed(blocks) for linears in block]


class _Measurement:
    """The constants of a measurement from block to block."""

    def __init__(
        self,
        model: DenoiserModel,
        samples: Sequence[CalibrationSample],
        recipe: Recipe,
        states: HiddenStates,
        gradients: HiddenStates,
        chunks: TokenChunks,
    ) -> None:
        self._model, self._samples, self._recipe = model, samples, recipe
        self._states, self._gradients, self._chunks = states, gradients, chunks
        self._device = torch.device("cpu")
        self.advance: Callable[[], None] = lambda: None

    @torch.no_grad()
    def run_forward(self) -> None:
        """Store the hidden states before every block, and after the last."""
        for index in range(self._model.num_blocks):
            with self._model.block(index) as block:
                for number, sample in enumerate(self._samples):
                    states = self._states_before(index, number, _device_of(block))
                    self._states.write(index + 1, number, self._model.run_block(index, sample, states))
                    give_back_freed_memory()
                    self.advance()
            self._states.commit(index + 1)

    def begin_backward(self) -> None:
        """Propagate random signs at each noise prediction back to the last block's output, in units
        of its power.
        """
        last = self._model.num_blocks
        for number, sample in enumerate(self._samples):
            with torch.enable_grad():
                states = self._states_before(last, number, self._device, with_gradient=True)
                noise_prediction = self._model.finish(sample, states)
            generator = torch.Generator().manual_seed(_SEED + number)  # on the CPU, so that every device draws the same
            signs = torch.randint(0, 2, noise_prediction.shape, generator=generator).to(noise_prediction) * 2 - 1
            power = noise_prediction.detach().float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
            noise_prediction.backward((signs / power.sqrt()).to(noise_prediction.dtype))
            self._gradients.write(last, number, _gradients_of(states))
            self.advance()
        self._gradients.commit(last)

    def run_backward(self, index: int) -> list[LinearsSensitivity]:
        """Run one block for the gradient at its input, and return the rounding errors of its
        linears.
        """
        with self._model.block(index) as block:
            groups = linear_groups(self._model, index, self._recipe)
            watched = [_WatchedInput(self._trials(index, block, *group)) for group in groups.items()]
            inputs = {each: block.get_submodule(names[0]) for each, names in zip(watched, groups, strict=True)}
            linears = {
                (each, self._model.name_of(index, name)): block.get_submodule(name)
                for each, names in zip(watched, groups, strict=True)
                for name in names
            }
            with (
                watching_inputs(inputs, lambda each, x: each.observe_input(x)),
                watching_gradients(linears, lambda key, gradient: key[0].observe_gradient(key[1], gradient)),
            ):
                for number in range(len(self._samples)):
                    self._run_sample_backward(index, block, number)
            with torch.no_grad():
                found = [each.finish(len(self._samples)) for each in watched]
        if index:
            self._gradients.commit(index)
        self._gradients.keep_only(index)
        return found

    def _run_sample_backward(self, index: int, block: nn.Module, number: int) -> None:
        states = self._states_before(index, number, _device_of(block), with_gradient=True)
        with torch.enable_grad():
            passed_on = self._model.run_block(index, self._samples[number], states)
        gradients = [each.to(_device_of(block)) for each in self._gradients.read(index + 1, number)]
        pairs = [(each, gradient) for each, gradient in zip(passed_on, gradients, strict=True) if each.requires_grad]
        torch.autograd.backward([each for each, _ in pairs], [gradient for _, gradient in pairs])
        if index:
            self._gradients.write(index, number, _gradients_of(states))
        del states, passed_on
        give_back_freed_memory()
        self.advance()

    def _states_before(
        self, index: int, number: int, device: torch.device, with_gradient: bool = False
    ) -> list[torch.Tensor]:
        """Return one sample's hidden states before a block, on the device; none before the first
        block.
        """
        self._device = device
        before = self._states.read(index, number) if index else []
        return [each.to(device).requires_grad_(with_gradient) for each in before]

    def _trials(self, index: int, block: nn.Module, names: tuple[str, ...], choice: Choice) -> RankTrials:
        linears = {self._model.name_of(index, name): linear_of(block, name) for name in names}
        ranks = candidate_ranks([linear.weight.shape for linear in linears.values()], choice.rank)
        return RankTrials(linears, choice.format, self._recipe, ranks, self._chunks)


def _device_of(block: nn.Module) -> torch.device:
    return next(block.parameters()).device


def _gradients_of(states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradient of each state; zeros if nothing depends on it."""
    return [torch.zeros_like(each) if each.grad is None else each.grad for each in states]


class _WatchedInput:
    """Watches linears that read one input, while a block runs forward and backward on every
    sample.
    """

    def __init__(self, trials: RankTrials) -> None:
        self._trials = trials
        self._tokens: list[torch.Tensor] = []
        self._gradients: dict[str, list[torch.Tensor]] = {name: [] for name in trials.names}
        self._num_tokens: list[int] = []
        self._gain = dict.fromkeys(trials.names, 0.0)

    def observe_input(self, x: torch.Tensor) -> None:
        """Add the input of one sample: (…, in)."""
        x = x.detach().reshape(-1, x.shape[-1])
        self._trials.observe(Phase.RANGE, x, timestep_bin=0)
        self._tokens.append(x[_spaced(x)].float())
        self._num_tokens.append(len(x))

    def observe_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Add the gradient at a linear's output for the latest input: (…, out)."""
        gradient = gradient.detach().reshape(-1, gradient.shape[-1])
        self._gradients[name].append(gradient[_spaced(gradient)].float())
        self._gain[name] += float(gradient.float().square().sum(dtype=torch.float64))

    def finish(self, num_samples: int) -> LinearsSensitivity:
        """Compute the means over the samples."""
        self._trials.end_phase(Phase.RANGE)
        errors = self._trials.errors(self._tokens, self._gradients, self._num_tokens)
        return {name: LayerSensitivity(gain / num_samples, errors[name]) for name, gain in self._gain.items()}


def _spaced(x: torch.Tensor) -> torch.Tensor:
    """Return the positions of the tokens that are kept of one sample."""
    return torch.linspace(0, len(x) - 1, min(TOKENS_PER_SAMPLE, len(x)), device=x.device).round().long()
