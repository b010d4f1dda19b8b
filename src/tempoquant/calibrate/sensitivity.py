"""How much each linear's rounding adds to the error of the noise prediction, at each rank of its branch (ours).

An error e of a linear's output, small and independent from entry to entry, moves the noise prediction by J·e, whose
power is Σ e² · (column of J)². One backward pass from random signs v gives Jᵀ·v for every linear at once, and its
square is in the mean over v the squared column: Hutchinson (1990), for the diagonal of Jᵀ·J. docs/method.md has the
rest.

Blocks stream: forward once, keeping what stands before each; then in reverse, each block alone runs again with
autograd, so that memory follows the size of one block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tempoquant.calibrate.capture import watching_gradients, watching_inputs
from tempoquant.calibrate.expert_model import BlockCall, Choice, ExpertModel, linear_groups, linear_of
from tempoquant.calibrate.freed_memory import give_back_freed_memory
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.phases import Phase
from tempoquant.calibrate.rank_trials import RankTrials
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.errors import CalibrationError
from tempoquant.progress import SILENT, Progress
from tempoquant.recipe import Recipe

MAX_SAMPLES = 8  # each has as many random signs as its noise prediction has entries: few say enough
TOKENS_PER_SAMPLE = 512
RANKS = (0, 2, 4, 8, 16, 32, 64, 128)
MAX_RANK_SHARE = 0.25  # of a weight's smaller side: beyond it, 16 bits are the better buy
_SEED = 0


@dataclass(frozen=True)
class LayerSensitivity:
    """One linear.

    Attributes:
        gain: relative error power of the noise prediction for error power 1 at every entry of the linear's output.
        errors: rank to the relative error power of the noise prediction that the linear's rounding alone adds.
    """

    gain: float
    errors: Mapping[int, float]


LinearsSensitivity = Mapping[str, LayerSensitivity]
"""Of linears that get one rank together, by their names in the expert."""


def spread_out(samples: Sequence[CalibrationSample], recipe: Recipe) -> list[CalibrationSample]:
    """At most MAX_SAMPLES of an expert's samples, evenly spaced in their order, which is that of the timesteps."""
    seen = [number for number, sample in enumerate(samples)
            if recipe.statistics_branches == "both" or sample.guidance_branch == "conditional"]  # fmt: skip
    spaced = torch.linspace(0, len(seen) - 1, min(MAX_SAMPLES, len(seen))).round().long().tolist()
    return [samples[seen[position]] for position in spaced]


def candidate_ranks(shapes: Sequence[torch.Size], recipe_rank: int) -> list[int]:
    """The ranks to try for weights (out, in) that get one together: RANKS within reason, and the recipe's own."""
    smaller_side = min(min(shape) for shape in shapes)
    within = {rank for rank in RANKS if rank <= MAX_RANK_SHARE * smaller_side}
    return sorted(within | {min(recipe_rank, smaller_side)})


def measure_expert(
    model: ExpertModel,
    samples: Sequence[CalibrationSample],
    recipe: Recipe,
    states: HiddenStates,
    gradients: HiddenStates,
    chunks: TokenChunks | None = None,
    progress: Progress = SILENT,
) -> list[LinearsSensitivity]:
    """Measure every linear that the recipe quantizes.

    Args:
        model: the 16-bit expert.
        samples: recorded calls of this expert; all are used, see `spread_out`.
        recipe: resolved.
        states: where the hidden states before every block lie meanwhile.
        gradients: where what comes back lies between two blocks.
        chunks: how many tokens are worked on at once.

    Returns:
        From the first block to the last; linears that get one rank together stand together.

    Raises:
        CalibrationError, ModelError, RecipeError, OutputError: naming the layer or file.
    """
    if not samples:
        raise CalibrationError(
            f"no calibration sample belongs to the {model.expert.value} expert: calibrate with more steps."
        )
    measurement = _Measurement(model, samples, recipe, states, gradients, chunks or TokenChunks())
    measurement.advance = progress.start(
        f"Measuring sensitivity of {model.expert.value}", (2 * model.num_blocks + 1) * len(samples)
    )
    measurement.run_forward()
    measurement.begin_backward()
    blocks = [measurement.run_back(index) for index in reversed(range(model.num_blocks))]
    return [linears for block in reversed(blocks) for linears in block]


class _Measurement:
    """What stays the same from block to block."""

    def __init__(
        self, model: ExpertModel, samples: Sequence[CalibrationSample], recipe: Recipe, states: HiddenStates,
        gradients: HiddenStates, chunks: TokenChunks,
    ) -> None:  # fmt: skip
        self._model, self._samples, self._recipe = model, samples, recipe
        self._states, self._gradients, self._chunks = states, gradients, chunks
        self._calls: list[BlockCall] = []
        self._device = torch.device("cpu")
        self.advance: Callable[[], None] = lambda: None

    @torch.no_grad()
    def run_forward(self) -> None:
        """Keep the hidden states before every block, and after the last."""
        for number, (_, call) in enumerate(self._model.first_block_calls(self._samples)):
            self._device = self._model.hidden_states(call).device
            self._states.write(0, number, self._model.hidden_states(call))
            self._calls.append(self._model.with_hidden_states(call, torch.empty(0)))
        self._states.commit(0)
        for index in range(self._model.num_blocks):
            with self._model.block(index) as block:
                for number in range(len(self._calls)):
                    self._states.write(index + 1, number, self._run(index, block, number, with_gradient=False)[1])
                    give_back_freed_memory()
                    self.advance()
            self._states.commit(index + 1)

    def begin_backward(self) -> None:
        """From random signs at each noise prediction back to what the last block made, in units of its power."""
        last = self._model.num_blocks
        for number, finish in enumerate(self._model.after_last_block(self._samples)):
            with torch.enable_grad():
                states = self._states.read(last, number).to(self._device).requires_grad_()
                noise_prediction = finish(states)
            generator = torch.Generator().manual_seed(_SEED + number)  # on the CPU: every device draws the same
            signs = torch.randint(0, 2, noise_prediction.shape, generator=generator).to(noise_prediction) * 2 - 1
            power = noise_prediction.detach().float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
            noise_prediction.backward((signs / power.sqrt()).to(noise_prediction.dtype))
            assert states.grad is not None
            self._gradients.write(last, number, states.grad)
            self.advance()
        self._gradients.commit(last)

    def run_back(self, index: int) -> list[LinearsSensitivity]:
        """One block: the gradient at its input, and what its linears' rounding costs."""
        with self._model.block(index) as block:
            groups = linear_groups(self._model, index, self._recipe)
            watched = [_Watched(self._trials(index, block, *group)) for group in groups.items()]
            inputs = {each: block.get_submodule(names[0]) for each, names in zip(watched, groups, strict=True)}
            linears = {(each, self._model.name_of(index, name)): block.get_submodule(name)
                       for each, names in zip(watched, groups, strict=True) for name in names}  # fmt: skip
            with (
                watching_inputs(inputs, lambda each, x: each.see_input(x)),
                watching_gradients(linears, lambda key, gradient: key[0].see_gradient(key[1], gradient)),
            ):
                for number in range(len(self._calls)):
                    self._run_one_back(index, block, number)
            with torch.no_grad():
                found = [each.finish(len(self._calls)) for each in watched]
        self._gradients.commit(index)
        self._gradients.forget_but(index)
        return found

    def _run_one_back(self, index: int, block: nn.Module, number: int) -> None:
        states, output = self._run(index, block, number, with_gradient=True)
        torch.autograd.backward(output, self._gradients.read(index + 1, number).to(output.device))
        assert states.grad is not None
        self._gradients.write(index, number, states.grad)
        del states, output
        give_back_freed_memory()
        self.advance()

    def _run(self, index: int, block: nn.Module, number: int, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A block on one sample: its hidden states before and after."""
        device = next(block.parameters()).device
        states = self._states.read(index, number).to(device).requires_grad_(with_gradient)
        args, kwargs = self._model.with_hidden_states(self._calls[number], states)
        with torch.set_grad_enabled(with_gradient):
            return states, block(*args, **kwargs)

    def _trials(self, index: int, block: nn.Module, names: tuple[str, ...], choice: Choice) -> RankTrials:
        linears = {self._model.name_of(index, name): linear_of(block, name) for name in names}
        ranks = candidate_ranks([linear.weight.shape for linear in linears.values()], choice.rank)
        return RankTrials(linears, choice.format, self._recipe, ranks, self._chunks)


class _Watched:
    """Linears that read one input, while a block runs forward and back on every sample."""

    def __init__(self, trials: RankTrials) -> None:
        self._trials = trials
        self._tokens: list[torch.Tensor] = []
        self._gradients: dict[str, list[torch.Tensor]] = {name: [] for name in trials.names}
        self._num_tokens: list[int] = []
        self._gain = dict.fromkeys(trials.names, 0.0)

    def see_input(self, x: torch.Tensor) -> None:
        """Of one sample: (…, in)."""
        x = x.detach().reshape(-1, x.shape[-1])
        self._trials.observe(Phase.RANGE, x, timestep_bin=0)
        self._tokens.append(x[_spaced(x)].float())
        self._num_tokens.append(len(x))

    def see_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """At the output of a linear for the input just seen: (…, out)."""
        gradient = gradient.detach().reshape(-1, gradient.shape[-1])
        self._gradients[name].append(gradient[_spaced(gradient)].float())
        self._gain[name] += float(gradient.float().square().sum(dtype=torch.float64))

    def finish(self, num_samples: int) -> LinearsSensitivity:
        """Means over the samples."""
        self._trials.settle(Phase.RANGE)
        errors = self._trials.errors(self._tokens, self._gradients, self._num_tokens)
        return {name: LayerSensitivity(gain / num_samples, errors[name]) for name, gain in self._gain.items()}


def _spaced(x: torch.Tensor) -> torch.Tensor:
    """Positions of the tokens that are kept of one sample."""
    return torch.linspace(0, len(x) - 1, min(TOKENS_PER_SAMPLE, len(x)), device=x.device).round().long()
