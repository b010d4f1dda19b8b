"""Numbers of models from numbers of videos, and their words: means, differences from the reference,
and between models.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tempoquant.evaluate.evaluation_folder import Take
from tempoquant.evaluate.metrics.measures import METRICS, Metric
from tempoquant.evaluate.metrics.statistics import Interval, mean_by_item, mean_interval, paired_difference

Measured = Mapping[Take, Mapping[str, Any]]


def summarize(measured: Measured, labels: Sequence[str], bins: Sequence[str]) -> list[dict[str, Any]]:
    """Make a row for each model (the reference first) and metric.

    If the reference has the metric too, the row holds the paired difference, model − reference, and
    its `low` and `high`. A metric that measures the distance to the reference has its mean, and the
    mean's `low` and `high`.

    Args:
        measured: every take's metrics.
        labels: the reference first.
        bins: names of the timestep bins.
    """
    rows = []
    for label, name in itertools.product(labels, _names(bins)):
        values, of_reference = _by_item(measured, label, name), _by_item(measured, labels[0], name)
        row = summary_row(label, name, metric_of(name), values, None if label == labels[0] else of_reference)
        if row is not None:
            rows.append(row)
    return rows


def summary_row(
    label: str, name: str, metric: Metric, values: Mapping[str, float], of_reference: Mapping[str, float] | None
) -> dict[str, Any] | None:
    """Make one row of `summarize`; None without any value.

    Args:
        values: by item.
        of_reference: the same of the reference, empty if it lacks this metric; None for the
            reference itself.
    """
    if of_reference:
        values = {key: value for key, value in values.items() if key in of_reference}
    if not values:
        return None
    mean = mean_interval(list(values.values()))
    difference = paired_difference(of_reference, values) if of_reference else None
    found = difference or mean
    row = {
        "label": label,
        "metric": name,
        "mean": mean.mean,
        "reference_mean": None,
        "difference": None,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "within_noise": None,
    }
    words = _mean_words(metric, mean)
    if of_reference and difference is not None:
        both = [value for key, value in of_reference.items() if key in values]
        row.update(reference_mean=mean_interval(both).mean, difference=found.mean, within_noise=found.holds_zero)
        words = f"{_number(metric, mean.mean)}, {_difference_words(metric, found, 'the reference')}"
    return {**row, "words": words}


def pairs(measured: Measured, labels: Sequence[str], bins: Sequence[str]) -> list[dict[str, Any]]:
    """Make a row for each two models (without the reference) and metric: the paired difference,
    second − first.
    """
    rows = []
    for (first, second), name in itertools.product(itertools.combinations(labels[1:], 2), _names(bins)):
        found = paired_difference(_by_item(measured, first, name), _by_item(measured, second, name))
        if found is not None:
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "metric": name,
                    "difference": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "n": found.n,
                    "within_noise": found.holds_zero,
                    "words": f"{second} is {_difference_words(metric_of(name), found, first)}",
                }
            )
    return rows


def metric_of(name: str) -> Metric:
    """Return the form of a row's metric; those of timestep bins are called "sqnr_db high_noise bin
    0".
    """
    key, _, bin_name = name.partition(" ")
    metric = METRICS[key]
    return Metric(f"{metric.words} after {bin_name}", metric.unit, metric.digits) if bin_name else metric


def _names(bins: Sequence[str]) -> list[str]:
    return [name for key in METRICS for name in ([f"{key} {bin}" for bin in bins] if key == "sqnr_db" else [key])]


def _by_item(measured: Measured, label: str, name: str) -> dict[str, float]:
    key, _, bin_name = name.partition(" ")
    values = []
    for take, metrics in measured.items():
        value = metrics.get(key)
        value = value.get(bin_name) if isinstance(value, Mapping) else value
        if take.label == label and value is not None:
            values.append((take.id, float(value)))
    return mean_by_item(values)


def _mean_words(metric: Metric, mean: Interval) -> str:
    if mean.low is None or mean.high is None:
        return f"{_number(metric, mean.mean)} ({_too_few(mean)})"
    low, high = _number(metric, mean.low), _number(metric, mean.high)
    return f"{_number(metric, mean.mean)} ({low} to {high}, n = {mean.n})"


def _difference_words(metric: Metric, difference: Interval, other: str) -> str:
    """Describe a difference: "0.0031 below the reference (−0.0052 to −0.0011, n = 24)"; "within
    noise" if zero is plausible.
    """
    size = _number(metric, abs(difference.mean))
    side = f"{size} {'above' if difference.mean > 0 else 'below'} {other}" if difference.mean else f"equal to {other}"
    if difference.low is None or difference.high is None:
        return f"{side} ({_too_few(difference)})"
    low, high = _number(metric, difference.low), _number(metric, difference.high)
    noise = ": within noise" if difference.holds_zero else ""
    return f"{side} ({low} to {high}, n = {difference.n}){noise}"


def _too_few(found: Interval) -> str:
    return f"n = {found.n}: too few for an interval"


def _number(metric: Metric, value: float) -> str:
    return f"{value:.{metric.digits}f}{metric.unit}".replace("-", "−")
