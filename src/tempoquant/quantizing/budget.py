"""A budget in place of a rank: the denoisers' bytes, spent where the noise prediction is most
sensitive.

The result is a recipe with a rule for each layer that departs from its settings. The checkpoint
stores that recipe, which gives the same layers without a budget.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tempoquant.calibrate.sensitivity_file import Sensitivity
from tempoquant.errors import RecipeError
from tempoquant.methods import Option, allocate
from tempoquant.models.source import SourceModel
from tempoquant.planning.block_costs import DenoiserCosts
from tempoquant.planning.layer_sizes import LayerSize, LayerSizes
from tempoquant.recipe import KEEP_16BIT, LayerRule, Recipe

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """The most that all denoisers together may take, in one of two units.

    Attributes:
        bits_per_weight: of all linears of the blocks, those kept in 16 bits included: everything
            stored in place of their weights.
        size_gib: of all denoisers' files, 2^30 bytes.

    Raises:
        RecipeError: neither or both are given, or one makes no sense.
    """

    bits_per_weight: float | None = None
    size_gib: float | None = None

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.size_gib is None):
            raise RecipeError("a budget is bits per weight or a size in GiB: give one of the two.")
        for value in (self.bits_per_weight, self.size_gib):
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"a budget is above 0 and finite, not {value}.")
        if self.bits_per_weight is not None and self.bits_per_weight >= 16:
            raise RecipeError(f"{self.bits_per_weight:g} bits a weight hold the model in 16 bits: give fewer than 16.")

    @property
    def words(self) -> str:
        """Describe the budget, such as "5 bits a weight"."""
        return f"{self.size_gib:g} GiB" if self.bits_per_weight is None else f"{self.bits_per_weight:g} bits a weight"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class _Item(NamedTuple):
    """Linears that get one rank together, and their options by rank; rank None means 16 bits."""

    denoiser: str
    names: tuple[str, ...]
    options: Mapping[int | None, Option]


class BudgetPlan:
    """A budget for one model under one recipe.

    Args:
        source: the 16-bit pipeline.
        recipe: resolved. Layers with a rule, and blocks in 16 bits, stay as the recipe says.

    Raises:
        RecipeError: the budget is below the recipe's minimum, or holds the whole model in 16 bits,
            or the recipe needs no activations.
        ModelError: the denoisers' files are missing or damaged.
    """

    def __init__(self, source: SourceModel, recipe: Recipe, budget: Budget) -> None:
        if not recipe.needs_calibration:
            raise RecipeError(
                f"a budget is spent by what calibration samples show, and recipe {recipe.name} looks at none: choose "
                "another recipe."
            )
        self._recipe, self._budget = recipe, budget
        self._sizes = {denoiser: LayerSizes(source, denoiser, recipe) for denoiser in source.denoiser_names}
        names = [(sizes, name) for sizes in self._sizes.values() for name in sizes]
        free = [(sizes, name) for sizes, name in names if sizes.is_free(name)]
        if not free:
            raise RecipeError(
                f"every layer has a rule in recipe {recipe.name}: nothing is left for a budget to decide."
            )
        self._num_weights = sum(sizes.num_weights(name) for sizes, name in names)
        fixed = [sizes.as_recipe_says(name) for sizes, name in names if not sizes.is_free(name)]
        if budget.size_gib is None:
            self._rest = sum(map(self._cost, fixed))
        else:
            now = sum(
                DenoiserCosts(source, denoiser, recipe, 0, "cpu").output_bytes for denoiser in source.denoiser_names
            )
            self._rest = now - sum(sizes.as_recipe_says(name).on_disk for sizes, name in free)
        self._require_between(
            self._rest + sum(self._cost(sizes.at_rank(name, 0)) for sizes, name in free),
            self._rest + sum(self._cost(sizes.in_16_bits(name)) for sizes, name in free),
        )

    def spend(self, sensitivity: Sensitivity) -> Recipe:
        """Return the recipe with a rule for each layer that gets another rank than the recipe's, or
        16 bits.

        Raises RecipeError if the sensitivity lacks a layer.
        """
        items = list(self._items(sensitivity))
        measured = {(item.denoiser, name) for item in items for name in item.names}
        for denoiser, sizes in self._sizes.items():
            for name in sizes:
                if sizes.is_free(name) and (denoiser, name) not in measured:
                    raise RecipeError(f"the sensitivity lacks {name} of {denoiser}: measure it again.")
        chosen = allocate([list(item.options.values()) for item in items], self._num_bytes - self._rest)
        rules = [
            rule
            for item, index in zip(items, chosen, strict=True)
            for rule in self._rules(item, list(item.options)[index])
        ]
        name = f"{self._recipe.name} ({self._budget.words})"
        return self._recipe.replace(name=name, layers=(*self._recipe.layers, *rules))

    @property
    def _num_bytes(self) -> int:
        """Return the budget in bytes."""
        if self._budget.bits_per_weight is not None:
            return math.floor(self._budget.bits_per_weight / 8 * self._num_weights)
        assert self._budget.size_gib is not None
        return math.floor(self._budget.size_gib * GIB)

    def _cost(self, size: LayerSize) -> int:
        """Return the part of a size that the budget counts."""
        return size.replacing if self._budget.size_gib is None else size.on_disk

    def _require_between(self, least: int, most: int) -> None:
        per_unit, unit = (GIB, "GiB") if self._budget.size_gib is not None else (self._num_weights / 8, "bits a weight")
        if self._num_bytes < least:
            raise RecipeError(
                f"the budget of {self._budget.words} is too small: without any low-rank branch, recipe "
                f"{self._recipe.name} takes {least / per_unit:.3f} {unit}."
            )
        if self._num_bytes >= most:
            raise RecipeError(
                f"the budget of {self._budget.words} holds every layer in 16 bits, which takes "
                f"{most / per_unit:.3f} {unit}: give less."
            )

    def _items(self, sensitivity: Sensitivity) -> Iterator[_Item]:
        for denoiser, groups in sensitivity.denoisers.items():
            sizes = self._sizes[denoiser]
            for linears in groups:
                if not all(name in sizes and sizes.is_free(name) for name in linears):
                    continue
                first = next(iter(linears.values()))
                options: dict[int | None, Option] = {
                    rank: Option(
                        sum(self._cost(sizes.at_rank(name, rank)) for name in linears),
                        sum(layer.errors[rank] for layer in linears.values()),
                    )
                    for rank in first.errors
                }
                options[None] = Option(sum(self._cost(sizes.in_16_bits(name)) for name in linears), 0.0)
                yield _Item(denoiser, tuple(linears), options)

    def _rules(self, item: _Item, rank: int | None) -> Iterator[LayerRule]:
        """Yield a rule for each linear of an item, unless the recipe has the same result."""
        for name in item.names:
            pattern = f"{item.denoiser}.{name}"
            if rank is None:
                yield LayerRule(pattern, KEEP_16BIT)
            elif rank != self._recipe.rank:
                yield LayerRule(pattern, rank=rank)
