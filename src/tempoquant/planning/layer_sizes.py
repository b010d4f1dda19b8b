"""The stored size of each linear of a denoiser, at every rank or in 16 bits: exact except for file
headers.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from tempoquant.checkpoint.tensors import StoredAs, num_replacing_bytes, stored_as
from tempoquant.formats import Format
from tempoquant.models.source import SourceModel
from tempoquant.planning.foreseen import HEADER_BYTES, Linear, foreseen_entry
from tempoquant.recipe import Recipe


class LayerSize(NamedTuple):
    """The size of a stored linear.

    Attributes:
        replacing: bytes in place of the weight, without the bias.
        on_disk: of all its tensors and their headers, as `DenoiserCosts.output_bytes` counts them.
    """

    replacing: int
    on_disk: int

    def __add__(self, other: object) -> "LayerSize":
        assert isinstance(other, LayerSize)
        return LayerSize(self.replacing + other.replacing, self.on_disk + other.on_disk)


class LayerSizes:
    """The linears of one denoiser's blocks under one recipe.

    Raises:
        ModelError: the denoiser's files are missing or damaged.
    """

    def __init__(self, source: SourceModel, denoiser: str, recipe: Recipe) -> None:
        self._forms = {name: form for name, (_, form) in source.forms(denoiser).items()}
        self._linears = source.linears(denoiser)
        self._denoiser, self._recipe = denoiser, recipe
        self._num_blocks = len(source.blocks(denoiser))
        self._num_bins = len(recipe.bin_fractions_of(denoiser)) + 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def num_weights(self, name: str) -> int:
        """Return the elements of a linear's weight."""
        return self._linears[name].out_features * self._linears[name].in_features

    def in_16_bits(self, name: str) -> LayerSize:
        """Return its size in the model's files."""
        forms = self._own(name)
        return LayerSize(_num_bytes(forms[0]), sum(_num_bytes(form) + HEADER_BYTES for form in forms))

    def at_rank(self, name: str, rank: int) -> LayerSize:
        """Return its size in the recipe's 4-bit format, with a low-rank branch of this rank."""
        own = self._own(name)
        dtype = str(own[1].dtype).removeprefix("torch.") if len(own) > 1 else None
        out_features, in_features, _ = self._linears[name]
        format = self._format(name)
        assert format is not None  # a layer kept in 16 bits has no rank
        linear = Linear(format, out_features, in_features, 0, rank)
        entry = foreseen_entry(self._recipe, linear, dtype, self._num_bins)
        stored = sum(_num_bytes(form) + HEADER_BYTES for form in stored_as(entry, self._num_bins).values())
        return LayerSize(num_replacing_bytes(entry, self._num_bins), stored + HEADER_BYTES * len(own))

    def as_recipe_says(self, name: str) -> LayerSize:
        """Return its size under the recipe's own rank and format, or in 16 bits if the recipe keeps
        it.
        """
        if self._format(name) is None:
            return self.in_16_bits(name)
        return self.at_rank(name, self._recipe.rank_of(name, self._denoiser))

    def is_free(self, name: str) -> bool:
        """Return whether a budget may decide over a layer: no rule names it, and its block is not
        kept in 16 bits.
        """
        return self._format(name) is not None and self._recipe.rule_of(name, self._denoiser) is None

    def _format(self, name: str) -> Format | None:
        return self._recipe.format_of(name, self._denoiser, self._linears[name].block_index, self._num_blocks)

    def _own(self, name: str) -> list[StoredAs]:
        """Return the 16-bit tensors: weight, and bias if there is one."""
        bias = self._forms.get(f"{name}.bias")
        return [self._forms[f"{name}.weight"], *([] if bias is None else [bias])]


def _num_bytes(form: StoredAs) -> int:
    return math.prod(form.shape) * form.dtype.itemsize
