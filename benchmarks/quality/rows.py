"""The recipes to compare. A new row is one more line here.

A setting to try on top of the paper recipe is an entry of CANDIDATES; OURS holds the changes of our
own recipe.
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tempoquant.errors import RecipeError
from tempoquant.formats import FORMATS
from tempoquant.recipe import Recipe

RANKS = (2, 16)
"""Ranks at the bundled models' width, 256: 2 is the share that rank 32 has of the 14B model's
width.
"""

_LEAST_ERROR = {"weight_scale_rule": "least_error", "activation_scale_rule": "least_error"}
_PAPERS_SEARCH = {
    key: getattr(Recipe.load("paper"), key) for key in ("clip_ratios", "exponent_offsets", "bin_fractions")
}

CANDIDATES: Mapping[str, Mapping[str, Any]] = {
    "least-error scales": _LEAST_ERROR,
    "centring": {"centring": True},
    "smoothing by rms": {"smoothing_statistic": "rms"},
    "deflation": {"deflation": True},
    "rotation": {"rotation": True},
    "act-order": {"act_order": True},
    "shared inputs": {"share_smoothing": True},
}
"""The changes of the paper recipe, by the name of a row, "paper + NAME"."""

WITHOUT: Mapping[str, Mapping[str, Any]] = {
    "without least-error scales": {"weight_scale_rule": "floor", "activation_scale_rule": "ceil"},
    "without centring": {"centring": False, "centring_by_bin": False},
    "with one mean for all timesteps": {"centring_by_bin": False},
    "without a prior": {"prior_fraction": 0.0},
    "without smoothing by rms": {"smoothing_statistic": "amax"},
    "without deflation": {"deflation": False},
    "without rotation": {"rotation": False},
    "without shared inputs": {"share_smoothing": False},
    "without GPTQ": {"gptq": False, "act_order": False},
    "without act-order": {"act_order": False},
    "with one clip ratio, searched": {**_PAPERS_SEARCH, "bin_fractions": ()},
    "with a clip ratio per bin, searched": _PAPERS_SEARCH,
    "with statistics of the conditional branch": {"statistics_branches": "conditional"},
    "with damping 0.1": {"damping_fraction": 0.1},
}
"""The changes of our default recipe, by the name of a row, "ours NAME"."""

EIGHT_BITS: Mapping[str, tuple[float, float]] = {
    "below timestep 500": (0.0, 500.0),
    "everywhere": (0.0, math.inf),
}
"""The timesteps with 8-bit activations, by the name of a row, "ours, W4A4 with A8 NAME". No W4A4
claim rests on these.
"""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "statistics of both guidance branches": {"statistics_branches": "both"},
    "blocks calibrated on quantized inputs": {"block_inputs": "quantized"},
    "smoothing shared by q, k and v": {"share_smoothing": True},
    "clip search on 4096 tokens a bin": {"clip_search_tokens_per_bin": 4096},
    "clip search on 64 tokens a bin": {"clip_search_tokens_per_bin": 64},
}
"""Other calibrations of the paper recipe, settled in docs/log.md: measured only on request."""

GROUPS = ("reference", "published", "candidate", "ours", "file", "without", "eight bits", "variant")
DEFAULT_GROUPS = tuple(group for group in GROUPS if group not in ("without", "eight bits", "variant"))


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        label: its unique name.
        recipe: None for the 16-bit model.
        group: of GROUPS.
        method: shared with the rows that differ only in format and rank; a line in the figure.
        eight_bit_timesteps: (low, high), the timesteps with 8-bit activations; None for none.
    """

    label: str
    recipe: Recipe | None
    group: str
    method: str
    eight_bit_timesteps: tuple[float, float] | None = None


def all_rows(formats: Sequence[str] = tuple(FORMATS), ranks: Sequence[int] = RANKS) -> list[Row]:
    """Return every row, format after format."""
    rows = [Row("16-bit", None, "reference", "16-bit")]
    for format in formats:
        rows += _published(format, ranks)
        rows += _on_paper(format, ranks)
    return rows


def rows_of_files(files: Sequence[str]) -> list[Row]:
    """Make a row for each recipe file, as it is."""
    recipes = [Recipe.load(file) for file in files]
    return [
        Row(r.name if r.name != "paper" else Path(f).name, r, "file", r.name)
        for f, r in zip(files, recipes, strict=True)
    ]


def select(rows: Sequence[Row], patterns: Sequence[str] | None, groups: Sequence[str] | None) -> list[Row]:
    """Return the rows whose label or method matches one of the patterns, in one of the groups.

    Without groups, patterns select among all groups, and no patterns select DEFAULT_GROUPS.

    Raises RecipeError for a pattern that matches nothing, and for two rows of one label.
    """
    groups = groups or (GROUPS if patterns else DEFAULT_GROUPS)
    found = [row for row in rows if row.group in groups]
    if patterns:
        for pattern in patterns:
            if not any(_matches(row, pattern) for row in found):
                raise RecipeError(f"no row matches {pattern!r}; there are {'; '.join(row.label for row in found)}.")
        found = [row for row in found if any(_matches(row, pattern) for pattern in patterns)]
    labels = [row.label for row in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise RecipeError(f"two rows are called {twice[0]!r}: give each recipe a name of its own.")
    return found


def _matches(row: Row, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (row.label, row.method))


def _published(format: str, ranks: Sequence[int]) -> Iterator[Row]:
    """Yield the published recipes, a step at a time."""
    svdquant, paper = (Recipe.load(name).replace(format=format) for name in ("svdquant", "paper"))
    yield _row("round to nearest", Recipe.load("rtn").replace(format=format))
    yield _row("smoothing", svdquant.replace(rank=0))
    for rank in ranks:
        yield _row("SVDQuant, data-free", svdquant.replace(rank=rank, smoothing_alpha=None))
        yield _row("SVDQuant", svdquant.replace(rank=rank))
        yield _row("SVDQuant + GPTQ", paper.replace(rank=rank, clip_ratios=()))
        yield _row("paper", paper.replace(rank=rank))


def _on_paper(format: str, ranks: Sequence[int]) -> Iterator[Row]:
    """Yield the paper recipe with one change each."""
    for rank in ranks:
        paper = Recipe.load("paper").replace(format=format, rank=rank)
        for name, changes in CANDIDATES.items():
            yield _row(f"paper + {name}", paper.replace(**changes), "candidate")
        ours = Recipe.load("default").replace(format=format, rank=rank)
        yield _row("ours", ours, "ours")
        for name, timesteps in EIGHT_BITS.items():
            row = _row(f"ours, W4A4 with A8 {name}", ours, "eight bits")
            yield row._replace(eight_bit_timesteps=timesteps)
        for name, changes in WITHOUT.items():
            yield _row(f"ours {name}", ours.replace(**changes), "without")
        for name, changes in VARIANTS.items():
            yield _row(f"paper, {name}", paper.replace(**changes), "variant")


def _row(method: str, recipe: Recipe, group: str = "published") -> Row:
    rank = f", rank {recipe.rank}" if recipe.rank else ""
    label = f"{method}, {recipe.format}{rank}"
    return Row(label, recipe.replace(name=label), group, method)
