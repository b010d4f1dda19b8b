"""A denoiser in calibration: one block in memory at a time, and the model's own forward between
blocks (ours).

To run block k, the model's own forward runs with every earlier block replaced by one that returns
its recorded output, until it calls block k. So nothing must be known about the computation between
two blocks, or the tensors that pass from one to the next: one tensor, two streams, or hints that
skip ten blocks. An earlier block's output is kept as long as the model needs it, which
`what_is_needed` finds out before anything runs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tempoquant.calibrate.capture import computing_with
from tempoquant.calibrate.denoiser_model import Carried
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.errors import ModelError
from tempoquant.models.denoiser_inputs import on_device
from tempoquant.models.guidance import prediction_of
from tempoquant.models.needed_outputs import Answer, Needed, what_is_needed
from tempoquant.models.weights import DenoiserWeights


class _Called(Exception):
    """Ends a forward once the wanted block has been called and has returned."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class ReplayedDenoiser:
    """One denoiser (`calibrate.denoiser_model.DenoiserModel`): at most one block, and the parts
    outside blocks, are in memory.
    """

    def __init__(self, weights: DenoiserWeights) -> None:
        self.denoiser = weights.denoiser
        self._weights, self._family = weights, weights.family
        self._model = weights.empty_model()
        self._names = weights.blocks
        self._blocks: list[nn.Module] = [self._model.get_submodule(name) for name in self._names]
        self.num_blocks = len(self._blocks)
        self._needed: Needed | None = None

    @contextlib.contextmanager
    def running(self, samples: Sequence[CalibrationSample]) -> Iterator[None]:
        """Hold the weights outside the blocks in memory within this context, for `run_block` and
        `finish`.
        """
        self._weights.fill(self._model, "")
        try:
            if self._needed is None:
                with torch.no_grad():
                    self._needed = what_is_needed(self._model, self._blocks, self._inputs(samples[0]))
            yield
        finally:
            self._weights.release(self._model, "")

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Read block `index` from the files, and drop it at the end."""
        block, prefix = self._blocks[index], f"{self._names[index]}."
        self._weights.fill(block, prefix)
        try:
            yield block
        finally:
            self._weights.release(block, prefix)

    def let_go(self, index: int, linears: Sequence[str]) -> None:
        """Give back the weights of some linears of block `index`, which is in memory and does not
        run any more.
        """
        for name in linears:
            self._weights.release(self._blocks[index].get_submodule(name), f"{self.name_of(index, name)}.")

    def run_block(self, index: int, sample: CalibrationSample, carried: Carried) -> Carried:
        """Run block `index` on one sample.

        Args:
            index: of a block that is in memory, see `block`.
            carried: outputs of earlier blocks that this or a later one needs.

        Returns:
            The same for the next block.
        """
        assert self._needed is not None  # `running` found it
        answers, block = self._needed.answers_before(index, carried), self._blocks[index]

        def run(*args: Any, **kwargs: Any) -> Any:
            raise _Called(type(block).forward(block, *args, **kwargs))

        forwards: dict[nn.Module, Callable[..., Any]] = dict(self._answering(answers))
        forwards[block] = run
        try:
            with computing_with(forwards):
                self._model(**self._inputs(sample))
        except _Called as called:
            return self._needed.carried_after(index, answers, called.answer)
        raise ModelError(f"the model ran without calling {self._names[index]}.")

    def finish(self, sample: CalibrationSample, carried: Carried) -> torch.Tensor:
        """Run everything after the last block, differentiably, and return the noise prediction."""
        assert self._needed is not None  # `running` found it
        with computing_with(self._answering(self._needed.answers_before(self.num_blocks, carried))):
            output = self._model(**self._inputs(sample))
        return prediction_of(output)

    def shared_inputs(self, index: int) -> list[tuple[str, ...]]:
        """Return the linears of a block that may be quantized, grouped by the input that they share
        in the family.
        """
        linears = self._linears(index, self._family.may_quantize)
        together = [tuple(name for name in group if name in linears) for group in self._family.shared_inputs]
        first = {name: group for group in together for name in group}
        return list(dict.fromkeys(first.get(name, (name,)) for name in linears))

    def modulation(self, index: int) -> list[str]:
        """Return the linears of a block whose weights alone may be quantized."""
        return self._linears(index, self._family.is_modulation)

    def name_of(self, index: int, linear: str) -> str:
        """Return a linear's full name, such as blocks.3.attn1.to_q."""
        return f"{self._names[index]}.{linear}"

    def _linears(self, index: int, wanted: Callable[[str], bool]) -> list[str]:
        named = self._blocks[index].named_modules()
        return [name for name, each in named if isinstance(each, nn.Linear) and wanted(self.name_of(index, name))]

    def _inputs(self, sample: CalibrationSample) -> dict[str, Any]:
        return {**on_device(self._model, self._family, sample.inputs, self._weights.device), "return_dict": False}

    def _answering(self, answers: Sequence[Answer]) -> dict[nn.Module, Callable[..., Any]]:
        return {block: functools.partial(_answer, answer) for block, answer in zip(self._blocks, answers, strict=False)}


def _answer(answer: Any, *_args: Any, **_kwargs: Any) -> Any:
    return answer
