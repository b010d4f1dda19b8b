"""The tables of `sensitivity`: a row for each block, a column for each of its linears."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from tempoquant.calibrate.sensitivity import LayerSensitivity
from tempoquant.calibrate.sensitivity_file import Sensitivity
from tempoquant.cli.tables import MIN_WIDTH, NOT_MEASURED
from tempoquant.timesteps import Expert


def sensitivity_text(sensitivity: Sensitivity, rank: int) -> RenderableType:
    """Both experts' tables at a rank, and below each what all layers together leave at every rank."""
    parts: list[RenderableType] = []
    for expert in Expert:
        parts += [_table(sensitivity, expert, rank), _all_ranks_line(_layers(sensitivity, expert))]
    return Group(*parts)


def sensitivity_record(sensitivity: Sensitivity, rank: int) -> dict[str, Any]:
    """For --json: each expert's layers with gain and errors by rank, and the SQNR of all together at the given one."""
    record: dict[str, Any] = {"rank": rank, "experts": {}}
    for expert in Expert:
        layers = _layers(sensitivity, expert)
        record["experts"][expert.value] = {
            "sqnr_db": _db(sum(_error_at(layer, rank) for layer in layers.values())),
            "layers": {name: {"gain": layer.gain, "errors": {str(r): e for r, e in layer.errors.items()}}
                       for name, layer in layers.items()},
        }  # fmt: skip
    return record


def _layers(sensitivity: Sensitivity, expert: Expert) -> dict[str, LayerSensitivity]:
    return {name: layer for linears in sensitivity.experts[expert] for name, layer in linears.items()}


def _table(sensitivity: Sensitivity, expert: Expert, rank: int) -> Table:
    layers = _layers(sensitivity, expert)
    by_block: dict[str, dict[str, float]] = {}
    for name, layer in layers.items():
        _, block, linear = name.split(".", 2)
        by_block.setdefault(block, {})[linear] = _error_at(layer, rank)
    linears = list(dict.fromkeys(linear for errors in by_block.values() for linear in errors))
    title = f"{expert.value}: SQNR in dB with one layer alone rounded, rank {rank}"
    table = Table(title=title, title_justify="left", min_width=MIN_WIDTH)
    for heading in ("block", *linears, "all"):
        table.add_column(heading, justify="right")
    for block, errors in by_block.items():
        cells = [NOT_MEASURED if each not in errors else f"{_db(errors[each]):.1f}" for each in linears]
        table.add_row(block, *cells, f"{_db(sum(errors.values())):.1f}")
    return table


def _all_ranks_line(layers: dict[str, LayerSensitivity]) -> str:
    """What all layers leave at each rank that every layer was measured at."""
    ranks = sorted(set.intersection(*(set(layer.errors) for layer in layers.values())) if layers else [])
    values = (f"{_db(sum(layer.errors[rank] for layer in layers.values())):.1f} at {rank}" for rank in ranks)
    return f"All layers together, by rank: {', '.join(values)} dB, to nearest, without GPTQ.\n"


def _error_at(layer: LayerSensitivity, rank: int) -> float:
    """At a rank, or the next lower one that was measured."""
    return layer.errors[max(each for each in layer.errors if each <= rank)]


def _db(error: float) -> float:
    return -10 * math.log10(error) if error > 0 else math.inf
