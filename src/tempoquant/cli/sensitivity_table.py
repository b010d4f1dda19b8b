"""The tables of `sensitivity`: a row for each block, a column for each of its linears."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from tempoquant.calibrate.sensitivity import LayerSensitivity
from tempoquant.calibrate.sensitivity_file import Sensitivity
from tempoquant.cli.tables import MIN_WIDTH, NOT_MEASURED
from tempoquant.recipe import KEEP_16BIT, Recipe

_ALL = "all"
_NUMBERED = re.compile(r"(.*?\.\d+)\.(.+)")


def sensitivity_text(sensitivity: Sensitivity, rank: int) -> RenderableType:
    """Return all denoisers' tables at a rank, each followed by the total error of its layers at
    every rank.
    """
    parts: list[RenderableType] = []
    for denoiser in sensitivity.denoisers:
        parts += [_table(sensitivity, denoiser, rank), _all_ranks_line(_layers(sensitivity, denoiser))]
    return Group(*parts)


def budget_text(sensitivity: Sensitivity, recipe: Recipe) -> RenderableType:
    """Return the recipe that a budget makes: each denoiser's ranks, and their predicted SQNR."""
    parts: list[RenderableType] = []
    for denoiser in sensitivity.denoisers:
        layers = _layers(sensitivity, denoiser)
        total = _db(sum(_error_under(recipe, denoiser, name, layer) for name, layer in layers.items()))
        text = functools.partial(_rank_text, recipe, denoiser)
        table = _grid(f"{denoiser}: ranks for {recipe.name}", _by_block(layers), text)
        parts += [table, f"All layers together: {total:.1f} dB, to nearest, without GPTQ.\n"]
    return Group(*parts)


def sensitivity_record(sensitivity: Sensitivity, rank: int) -> dict[str, Any]:
    """Return for --json each denoiser's layers with gain and errors by rank, and their SQNR at the
    given rank.
    """
    record: dict[str, Any] = {"rank": rank, "denoisers": {}}
    for denoiser in sensitivity.denoisers:
        layers = _layers(sensitivity, denoiser)
        record["denoisers"][denoiser] = {
            "sqnr_db": _db(sum(_error_at(layer, rank) for layer in layers.values())),
            "layers": {
                name: {"gain": layer.gain, "errors": {str(r): e for r, e in layer.errors.items()}}
                for name, layer in layers.items()
            },
        }
    return record


def _layers(sensitivity: Sensitivity, denoiser: str) -> dict[str, LayerSensitivity]:
    return {name: layer for linears in sensitivity.denoisers[denoiser] for name, layer in linears.items()}


def _table(sensitivity: Sensitivity, denoiser: str, rank: int) -> Table:
    by_block = _by_block(_layers(sensitivity, denoiser))

    def text(block: str, linear: str) -> str:
        layers = by_block[block].values() if linear == _ALL else [by_block[block][linear]]
        return f"{_db(sum(_error_at(layer, rank) for layer in layers)):.1f}"

    return _grid(f"{denoiser}: SQNR in dB with one layer alone rounded, rank {rank}", by_block, text, (_ALL,))


def _by_block(layers: dict[str, LayerSensitivity]) -> dict[str, dict[str, LayerSensitivity]]:
    found: dict[str, dict[str, LayerSensitivity]] = {}
    for name, layer in layers.items():
        # A block is a numbered member of a list: its name is everything up to the first number.
        block, linear = _NUMBERED.fullmatch(name).groups()  # type: ignore[union-attr]
        found.setdefault(block, {})[linear] = layer
    return found


def _grid(
    title: str,
    by_block: dict[str, dict[str, LayerSensitivity]],
    text: Callable[[str, str], str],
    more: tuple[str, ...] = (),
) -> Table:
    """Make a table with a row for each block and a column for each linear; text(block, linear)
    fills a cell.
    """
    linears = list(dict.fromkeys(linear for layers in by_block.values() for linear in layers))
    table = Table(title=title, title_justify="left", min_width=MIN_WIDTH)
    for heading in ("block", *linears, *more):
        table.add_column(heading, justify="right")
    has_one_list = len({block.rpartition(".")[0] for block in by_block}) == 1
    for block, layers in by_block.items():
        cells = [text(block, each) if each in layers or each in more else NOT_MEASURED for each in (*linears, *more)]
        table.add_row(block.rpartition(".")[2] if has_one_list else block, *cells)
    return table


def _rank_text(recipe: Recipe, denoiser: str, block: str, linear: str) -> str:
    name = f"{block}.{linear}"
    rule = recipe.rule_of(name, denoiser)
    return KEEP_16BIT if rule is not None and rule.format == KEEP_16BIT else str(recipe.rank_of(name, denoiser))


def _error_under(recipe: Recipe, denoiser: str, name: str, layer: LayerSensitivity) -> float:
    rule = recipe.rule_of(name, denoiser)
    is_kept = rule is not None and rule.format == KEEP_16BIT
    return 0.0 if is_kept else _error_at(layer, recipe.rank_of(name, denoiser))


def _all_ranks_line(layers: dict[str, LayerSensitivity]) -> str:
    """Return the total error of all layers at each rank that every layer was measured at."""
    ranks = sorted(set.intersection(*(set(layer.errors) for layer in layers.values())) if layers else [])
    values = (f"{_db(sum(layer.errors[rank] for layer in layers.values())):.1f} at {rank}" for rank in ranks)
    return f"All layers together, by rank: {', '.join(values)} dB, to nearest, without GPTQ.\n"


def _error_at(layer: LayerSensitivity, rank: int) -> float:
    """Return the error at a rank, or at the next lower one that was measured."""
    return layer.errors[max(each for each in layer.errors if each <= rank)]


def _db(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf
