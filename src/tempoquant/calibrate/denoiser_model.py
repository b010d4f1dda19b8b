"""The interface between calibration and a model, and the groups of a block's linears."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.formats import Format
from tempoquant.recipe import Recipe

Carried: TypeAlias = Sequence[torch.Tensor]
"""The tensors that pass from the blocks before some point of a denoiser to those after it, for one
sample.
"""


class DenoiserModel(Protocol):
    """The interface between calibration and a model. A new model satisfies this and nothing
    else.
    """

    denoiser: str
    num_blocks: int

    def running(self, samples: Sequence[CalibrationSample]) -> AbstractContextManager[None]:
        """Allow `run_block` and `finish` on these samples within this context. No block is in
        memory before.
        """

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Hold one block in memory within the context, on the device and in the dtype of
        calibration.
        """

    def let_go(self, index: int, linears: Sequence[str]) -> None:
        """Give back the weights of some linears of block `index`, which is in memory and does not
        run any more.
        """

    def run_block(self, index: int, sample: CalibrationSample, carried: Carried) -> Carried:
        """Run block `index`, which is in memory, on one sample, and return the tensors carried past
        it. Block 0 has none before it.
        """

    def finish(self, sample: CalibrationSample, carried: Carried) -> torch.Tensor:
        """Run everything after the last block on one sample, differentiably, and return the noise
        prediction.
        """

    def shared_inputs(self, index: int) -> Sequence[Sequence[str]]:
        """Return a block's linears that may be quantized, by their names in it, grouped by the
        input they read.
        """

    def modulation(self, index: int) -> Sequence[str]:
        """Return a block's linears whose weights alone may be quantized, by their names in it."""

    def name_of(self, index: int, linear: str) -> str:
        """Return a linear's full name in the denoiser."""


class Choice(NamedTuple):
    """The recipe's choice for a linear: its 4-bit format, the rank of its low-rank branch, and
    whether its input keeps 16 bits.
    """

    format: Format
    rank: int
    weights_alone: bool = False


def linear_groups(model: DenoiserModel, index: int, recipe: Recipe) -> dict[tuple[str, ...], Choice]:
    """Return the linears of a block that a recipe quantizes, by their names in it.

    Linears that read one input form a group if the recipe shares smoothing and treats them alike.
    """
    found: dict[tuple[str, ...], Choice] = {}
    for names in model.shared_inputs(index):
        by_choice: dict[Choice, list[str]] = {}
        for name in names:
            full_name = model.name_of(index, name)
            format = recipe.format_of(full_name, model.denoiser, index, model.num_blocks)
            if format is not None:
                by_choice.setdefault(Choice(format, recipe.rank_of(full_name, model.denoiser)), []).append(name)
        for choice, alike in by_choice.items():
            groups = [alike] if recipe.share_smoothing else [[name] for name in alike]
            found |= {tuple(group): choice for group in groups}
    return found


def modulation_groups(model: DenoiserModel, index: int, recipe: Recipe) -> dict[tuple[str, ...], Choice]:
    """Return a block's linears whose weights alone a recipe quantizes, one a group, by their names
    in it.
    """
    found: dict[tuple[str, ...], Choice] = {}
    for name in model.modulation(index):
        full_name = model.name_of(index, name)
        format = recipe.format_of(full_name, model.denoiser, index, model.num_blocks, is_modulation=True)
        if format is not None:
            found[(name,)] = Choice(format, 0, weights_alone=True)
    return found


def for_weights_alone(recipe: Recipe) -> Recipe:
    """Return the recipe for a linear whose input is not rounded: it keeps only how weights are."""
    return recipe.replace(
        layers=(),
        smoothing_alpha=None,
        rank=0,
        deflation=False,
        deflation_by_bin=False,
        rotation=False,
        centring=False,
        centring_by_bin=False,
        clip_ratios=(),
    )


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """Return one linear of a block by its name in it. Raises TypeError for any other module."""
    linear = block.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name} is a {type(linear).__name__}, not an nn.Linear")
    return linear
