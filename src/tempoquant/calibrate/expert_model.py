"""What calibration must know of a model, and which of a block's linears it takes together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.formats import Format
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


class ExpertModel(Protocol):
    """What calibration must know of a model. A new model satisfies this and nothing else."""

    expert: Expert
    num_blocks: int

    def first_block_calls(self, samples: Sequence[CalibrationSample]) -> Iterator[tuple[CalibrationSample, BlockCall]]:
        """For each sample, run everything before the first block: the arguments the block would be called with."""

    def after_last_block(
        self, samples: Sequence[CalibrationSample]
    ) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """For each sample, all that comes after the last block: its output to the noise prediction, differentiable."""

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """One block, in memory within the context, on the device and in the dtype calibration computes in."""

    def shared_inputs(self, index: int) -> Sequence[Sequence[str]]:
        """The linears of one block that may be quantized, by their names in it; those that read one input together."""

    def name_of(self, index: int, linear: str) -> str:
        """A linear's full name in the expert."""

    def hidden_states(self, call: BlockCall) -> torch.Tensor:
        """What passes from block to block, in one call."""

    def with_hidden_states(self, call: BlockCall, hidden_states: torch.Tensor) -> BlockCall:
        """The same call with other hidden states."""


class Choice(NamedTuple):
    """What a recipe does to a linear: its 4-bit format, and the rank of its low-rank branch."""

    format: Format
    rank: int


def linear_groups(model: ExpertModel, index: int, recipe: Recipe) -> dict[tuple[str, ...], Choice]:
    """The linears of a block that a recipe quantizes, by their names in it.

    Those that read one input stand together where the recipe shares smoothing and does the same to them.
    """
    found: dict[tuple[str, ...], Choice] = {}
    for names in model.shared_inputs(index):
        by_choice: dict[Choice, list[str]] = {}
        for name in names:
            full_name = model.name_of(index, name)
            format = recipe.format_of(full_name, model.expert, index, model.num_blocks)
            if format is not None:
                by_choice.setdefault(Choice(format, recipe.rank_of(full_name, model.expert)), []).append(name)
        for choice, alike in by_choice.items():
            groups = [alike] if recipe.share_smoothing else [[name] for name in alike]
            found |= {tuple(group): choice for group in groups}
    return found


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """One linear of a block by its name in it. Raises TypeError for any other module."""
    linear = block.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not an nn.Linear")
    return linear
