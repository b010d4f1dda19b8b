"""The headline table: quality, size, memory and speed, a column per model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.filters import do_filesizeformat

from tempoquant.evaluate.cost_summaries import ON_CPU
from tempoquant.report.merge import Part
from tempoquant.report.metrics import (
    AGAINST,
    ALONE,
    NOT_MEASURED,
    TRAP,
    VBENCH,
    WORLD,
    Metric,
    is_part,
    metric_of,
    place_of,
    signed_minus,
)

NO_INTERVAL = (
    "Time is a median over items with the interval of that. Memory is the largest of all videos, with the least and "
    "the largest under it; size is counted: these have no interval."
)


@dataclass(frozen=True)
class Cell:
    """One number.

    Attributes:
        text: the number with its unit.
        difference: from 16-bit, such as "Δ −0.4"; empty if the metric itself compares with 16-bit.
        interval: of the difference if there is one, else of the mean, such as "30.1 … 32.4", or the
            reason for its absence; empty if none is expected.
        words: the evaluation's own sentence about it.
        within_noise: True if the difference may be chance, None if that was not tested.
        num_items: items behind it; None if it is no mean.
    """

    text: str
    interval: str = ""
    difference: str = ""
    words: str = ""
    within_noise: bool | None = None
    num_items: int | None = None


CellOf = Callable[[Mapping[str, Any]], Cell | str | None]
"""A function from a model to a cell, or to the text of a cell, or to None."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a title, its meaning, and a cell for each label."""

    title: str
    explanation: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Rows under one heading, with a warning that applies to all of them, or none."""

    title: str
    rows: tuple[Row, ...]
    warning: str = ""


def headline(part: Part) -> list[Group]:
    """Return the groups of rows; rows without any number are left out."""
    groups = [
        Group(f"Quality {AGAINST}", _quality(part, lambda metric: metric.family == AGAINST)),
        Group("VBench", _quality(part, lambda metric: metric.family == VBENCH, rows=part.vbench_summary), TRAP),
        Group("Prompt followed", _quality(part, lambda metric: metric.family == WORLD)),
        Group("Quality of the video alone", _quality(part, lambda metric: metric.family == ALONE), TRAP),
        Group("Size", _size(part)),
        Group("Memory", _memory(part)),
        Group("Speed", _speed(part), "" if _ran_on_a_gpu(part) else ON_CPU),
    ]
    return [group for group in groups if group.rows]


def by_bin(part: Part) -> list[Group]:
    """Return the measures after each timestep bin, in sampling order."""
    rows = _quality(part, lambda metric: True, parts=True)
    return [Group("After each timestep bin", rows)] if rows else []


def _quality(
    part: Part,
    wanted: Callable[[Metric], bool],
    parts: bool = False,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Row, ...]:
    """Return the quality rows of the part's summary, or of other rows in that form."""
    summary, made = part.summary if rows is None else rows, []
    for key in sorted(dict.fromkeys(row["metric"] for row in summary), key=place_of):
        metric = metric_of(key)
        if is_part(key) == parts and wanted(metric):
            found = {row["label"]: row for row in summary if row["metric"] == key}
            cells = tuple(_quality_cell(metric, label, found, part.reference) for label in part.labels)
            arrow = {1: " ↑", -1: " ↓", 0: ""}[metric.better]
            made.append(Row(metric.title + arrow, metric.explanation, cells))
    return tuple(made)


def _quality_cell(metric: Metric, label: str, rows: Mapping[str, Mapping[str, Any]], reference: str) -> Cell:
    row = rows.get(label)
    if row is None:
        means = [other.get("reference_mean") for other in rows.values() if label == reference]
        return Cell(metric.text(next((mean for mean in means if mean is not None), None)))
    interval = ""
    if row.get("low") is not None and row.get("high") is not None:
        interval = f"{_bare(metric, row['low'])} … {_bare(metric, row['high'])}"
    else:
        interval = "too few for an interval"
    difference = ""
    if row.get("difference") is not None:
        sign = "+" if row["difference"] > 0 else ""
        difference = f"Δ {sign}{_bare(metric, row['difference'])}"
    return Cell(metric.text(row.get("mean")), interval, difference, row["words"], row.get("within_noise"), row.get("n"))


def _bare(metric: Metric, value: float) -> str:
    """Write a value without its unit, which stands beside the mean."""
    return signed_minus(value * (100 if metric.unit == "%" else 1), metric.digits)


def _size(part: Part) -> tuple[Row, ...]:
    return _rows(
        part,
        (
            "Bits per weight",
            "Bits of everything stored in place of the 4-bit layers' weights.",
            lambda model: _number(model.get("bits_per_weight"), 2),
        ),
        ("On disk", "The denoisers.", lambda model: _bytes(model.get("num_bytes"))),
        (
            "Activations",
            "Bits of the inputs of 4-bit linears; 8@LOW-HIGH at these timesteps, 4 at the others.",
            lambda model: model.get("activation_bits") and f"{model['activation_bits']} bits",
        ),
    )


def _memory(part: Part) -> tuple[Row, ...]:
    memories = [model.get("memory") or {} for model in part.models.values()]
    stages = dict.fromkeys(stage for memory in memories for stage in memory.get("peak_gpu_gib") or {})
    rows: list[tuple[str, str, CellOf]] = [
        (
            "Peak RAM",
            "Largest resident set of the process, of all videos.",
            lambda model: _largest((model.get("memory") or {}).get("peak_rss_gib"), _costs(model, "peak_rss_gib")),
        ),
    ]
    for stage in stages:
        rows.append((f"Peak GPU, {stage}", "Largest allocation of that stage.", _gpu_stage(stage)))
    return _rows(part, *rows)


def _gpu_stage(stage: str) -> CellOf:
    return lambda model: _largest(
        ((model.get("memory") or {}).get("peak_gpu_gib") or {}).get(stage), _costs(model, "peak_gpu_gib").get(stage)
    )


def _ran_on_a_gpu(part: Part) -> bool:
    return any((model.get("memory") or {}).get("peak_gpu_gib") for model in part.models.values())


def _costs(model: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the spread of a cost; empty in evaluations of earlier versions."""
    return (model.get("costs") or {}).get(name) or {}


def _largest(gib: float | None, spread: Mapping[str, Any] | None) -> Cell | None:
    if gib is None:
        return None
    between = f"{spread['least']:.2f} … {spread['most']:.2f} of {spread['n']} videos" if spread else ""
    return Cell(f"{gib:.2f} GiB", between)


def _time(found: Mapping[str, Any], digits: int, unit: str) -> Cell | None:
    """Return a cell with a median over items."""
    if not found:
        return None
    interval = "too few for an interval"
    if found["low"] is not None:
        interval = f"{found['low']:.{digits}f} … {found['high']:.{digits}f}"
    return Cell(f"{found['median']:.{digits}f}{unit}", interval, num_items=found["n"])


def _speed(part: Part) -> tuple[Row, ...]:
    return _rows(
        part,
        (
            "Time per step",
            "One denoising step, both calls of guidance included.",
            lambda model: (
                _time(_costs(model, "seconds_per_step"), 3, " s") or _number(model.get("seconds_per_step"), 3, " s")
            ),
        ),
        (
            f"Time per step against {part.reference}",
            "Of the same item, then the median; above 1 is slower.",
            lambda model: _time(_costs(model, "seconds_per_step_ratio"), 2, " ×"),
        ),
        (
            "Speed mode",
            "A column with skipped steps or attention in fewer bits is not W4A4 alone.",
            lambda model: model.get("speed"),
        ),
        (
            "Kernels",
            "The kernels of the 4-bit linears; “reference” is the definition in plain PyTorch, and slow.",
            lambda model: ", ".join(f"{key}: {value}" for key, value in (model.get("kernels") or {}).items()),
        ),
    )


def _rows(part: Part, *rows: tuple[str, str, CellOf]) -> tuple[Row, ...]:
    made = []
    for title, explanation, cell_of in rows:
        found = [cell_of(part.models[label]) for label in part.labels]
        if any(found):
            cells = (each if isinstance(each, Cell) else Cell(each or NOT_MEASURED) for each in found)
            made.append(Row(title, explanation, tuple(cells)))
    return tuple(made)


def _number(value: float | None, digits: int, unit: str = "") -> str | None:
    return None if value is None else f"{value:.{digits}f}{unit}"


def _bytes(value: int | None) -> str | None:
    return None if value is None else do_filesizeformat(value, binary=True)
