"""Error against bits: the positions of a chart's points and labels, which page.html draws.

A dozen points with intervals are drawn by hand, as SVG elements that take their colours and font
from the page's style (dark and light) and carry their numbers as text for a screen reader.
matplotlib writes fixed colours and outlines of letters into its SVG. plotly.js would add 4 MB to
every page, and vega needs eval, which the page's policy forbids.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tempoquant.report.metrics import Metric, is_part, metric_of, place_of

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40
"""Units of the viewBox, which are pixels at the intended size of a chart."""
MARKERS = ("circle", "square", "diamond", "triangle")
APART = 9.0
"""The distance between points at (nearly) the same bits; closer intervals would hide each other."""


@dataclass(frozen=True)
class Tick:
    """A number at an axis, and its position."""

    place: float
    text: str


@dataclass(frozen=True)
class Point:
    """One model: its position, its interval (None without one), its colour and marker, and a
    sentence for it.
    """

    index: int
    marker: str
    x: float
    y: float
    low_y: float | None
    high_y: float | None
    sentence: str


@dataclass(frozen=True)
class Chart:
    """One metric of all models against their bits per weight. `reference_y` is the score of 16
    bits, if it has one.
    """

    metric: Metric
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    reference_y: float | None
    reference_sentence: str


def charts_of(labels: Sequence[str], bits: Mapping[str, Any], summary: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Make a chart for each metric of the summary that a model with known bits has; labels start
    with the reference.
    """
    charts = []
    keys = dict.fromkeys(row["metric"] for row in summary if not is_part(row["metric"]))
    for key in sorted(keys, key=place_of):
        rows = {row["label"]: row for row in summary if row["metric"] == key and row.get("mean") is not None}
        shown = [label for label in labels[1:] if label in rows and bits.get(label) is not None]
        if shown:
            charts.append(_chart(metric_of(key), shown, labels, bits, rows))
    return charts


def interval_of_mean(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the row's interval, moved to its mean if it is the interval of a difference from the
    reference.
    """
    if row.get("low") is None or row.get("high") is None:
        return None
    base = row["reference_mean"] if row.get("difference") is not None and row.get("reference_mean") is not None else 0
    return base + row["low"], base + row["high"]


def _chart(
    metric: Metric,
    shown: Sequence[str],
    labels: Sequence[str],
    bits: Mapping[str, float],
    rows: Mapping[str, Mapping[str, Any]],
) -> Chart:
    intervals = {label: interval_of_mean(rows[label]) for label in shown}
    reference = next(
        (rows[label]["reference_mean"] for label in shown if rows[label].get("reference_mean") is not None), None
    )
    values = [rows[label]["mean"] for label in shown] + [end for pair in intervals.values() for end in pair or ()]
    values += [] if reference is None else [reference]
    y_numbers = nice_ticks(min(values), max(values), 4)
    x_numbers = nice_ticks(min(bits[label] for label in shown), max(bits[label] for label in shown), 4)

    def x_of(value: float) -> float:
        return LEFT + 16 + (value - x_numbers[0]) / (x_numbers[-1] - x_numbers[0]) * (WIDTH - LEFT - RIGHT - 32)

    def y_of(value: float) -> float:
        return TOP + (y_numbers[-1] - value) / (y_numbers[-1] - y_numbers[0]) * (HEIGHT - TOP - BOTTOM)

    points = []
    for label, x in zip(shown, _apart([x_of(bits[label]) for label in shown]), strict=True):
        index, interval = labels.index(label), intervals[label]
        low, high = (None, None) if interval is None else (y_of(interval[0]), y_of(interval[1]))
        words = f"{label}: {bits[label]:.2f} bits per weight, {metric.title} {metric.text(rows[label]['mean'])}"
        if interval is not None:
            words += f", interval {metric.text(interval[0])} to {metric.text(interval[1])}"
        marker = MARKERS[(index - 1) % len(MARKERS)]
        points.append(Point(index, marker, x, y_of(rows[label]["mean"]), low, high, words))
    return Chart(
        metric,
        tuple(points),
        tuple(Tick(x_of(number), _tick_text(number, x_numbers, metric, False)) for number in x_numbers),
        tuple(Tick(y_of(number), _tick_text(number, y_numbers, metric, True)) for number in y_numbers),
        None if reference is None else y_of(reference),
        "" if reference is None else f"{labels[0]}: {metric.text(reference)}",
    )


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Return at least two round numbers (1, 2 or 5 times a power of ten apart) that enclose `low`
    and `high`.
    """
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(abs(low), 1.0) * 0.1, high + 0.5 * max(abs(high), 1.0) * 0.1
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _tick_text(number: float, numbers: Sequence[float], metric: Metric, is_value: bool) -> str:
    scale = 100 if is_value and metric.unit == "%" else 1
    step = (numbers[1] - numbers[0]) * scale
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{number * scale:.{digits}f}".replace("-", "−")


def _apart(places: Sequence[float]) -> list[float]:
    """Move positions that are closer than APART away from each other, as little as possible, and
    keep their order.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + APART)
    # The shift went right only: give half of it back to each crowded run.
    shift = [moved[index] - places[index] for index in order]
    for position, index in enumerate(order):
        run_end = position
        while run_end + 1 < len(order) and shift[run_end + 1] > 0:
            run_end += 1
        moved[index] -= shift[run_end] / 2 if shift[run_end] > 0 else 0
    return moved
