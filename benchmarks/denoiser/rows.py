"""The recipes to compare. A new row is one more line of `all_rows`."""

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

from tempoquant.errors import RecipeError
from tempoquant.recipe import Recipe

FORMAT = "nvfp4_m1"
RANK_SHARE = 0.02
"""A layer's rank over the narrower of its sides, for rows without a rank: 32 is 0.6 % of the 14B
model's.
"""


class Row(NamedTuple):
    """One recipe, its number of timestep bins, and its rank, or None for RANK_SHARE of each layer's
    width.
    """

    label: str
    recipe: Recipe
    num_bins: int
    rank: int | None = None

    def recipe_of(self, shape: Sequence[int]) -> Recipe:
        """Return the recipe of a layer with this (out, in)."""
        if self.recipe.rank == 0:
            return self.recipe
        wanted = max(1, round(RANK_SHARE * min(shape))) if self.rank is None else self.rank
        return self.recipe.replace(rank=min(wanted, *shape))


def all_rows() -> list[Row]:
    """Return every row, in the order of the table."""
    rtn, svdquant, paper, ours = (
        Recipe.load(name).replace(format=FORMAT) for name in ("rtn", "svdquant", "paper", "default")
    )
    rows = [
        Row("rtn", rtn, 1),
        Row("rtn, mxfp4", rtn.replace(format="mxfp4"), 1),
        Row("svdquant", svdquant, 1),
        Row("paper, one clip ratio", paper, 1),
        Row("paper, 3 bins", paper, 3),
        Row("ours, 1 bin", ours, 1),
        Row("ours, 3 bins", ours, 3),
        Row("ours, 8 bins", ours, 8),
        Row("ours without a prior, 8 bins", ours.replace(prior_fraction=0.0), 8),
        Row("ours, deflation by bin, 3 bins", ours.replace(deflation_by_bin=True), 3),
    ]
    wide = [Row(f"{row.label}, rank 16", row.recipe, row.num_bins, 16) for row in (rows[4], rows[7])]
    return rows + wide


FIGURE = ("paper, 3 bins", "ours, 1 bin", "ours, 8 bins")
"""Labels of the rows that the figure shows."""


def select(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[Row]:
    """Return rows whose label matches one of the patterns; all without. Raises RecipeError for a
    pattern that matches none.
    """
    for pattern in patterns or ():
        if not fnmatch.filter([row.label for row in rows], pattern):
            raise RecipeError(f"no row is called {pattern!r}; rows are {'; '.join(row.label for row in rows)}.")
    return [row for row in rows if patterns is None or any(fnmatch.fnmatchcase(row.label, p) for p in patterns)]
