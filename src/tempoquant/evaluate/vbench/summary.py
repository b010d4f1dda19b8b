"""Summaries of VBench's scores of models: means, differences from the reference, and the drop as
challenges count it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempoquant.errors import EvaluationError
from tempoquant.evaluate.evaluation_folder import EvaluationFolder
from tempoquant.evaluate.metrics.measures import Metric
from tempoquant.evaluate.metrics.statistics import Interval, mean_by_item, resampled_interval
from tempoquant.evaluate.plan import Plan
from tempoquant.evaluate.summaries import summary_row
from tempoquant.evaluate.vbench.dimensions import DIMENSIONS
from tempoquant.evaluate.vbench.scores import Failure, Scores, score_missing
from tempoquant.evaluate.vbench.settings import VBench
from tempoquant.progress import Progress

RAW_MEAN, NORMALISED_MEAN, DROP = "vbench_raw_mean", "vbench_normalised_mean", "vbench_relative_drop"

METRICS = {
    RAW_MEAN: Metric("VBench, raw mean", "", 4),
    NORMALISED_MEAN: Metric("VBench, normalised mean", "", 4),
    DROP: Metric("VBench, relative drop", " %", 2),
    **{f"vbench_{name}": Metric(f"VBench {name.replace('_', ' ')}", "", 4) for name in DIMENSIONS},
}
"""In the order of reports. A drop is written in per cent, and stored as a fraction."""

ByItem = Mapping[str, Mapping[str, float]]
"""A model's score by dimension and item, averaged over the seeds of an item."""


def scored_by_vbench(
    folder: EvaluationFolder, plan: Plan, labels: Sequence[str], vbench: VBench, progress: Progress
) -> dict[str, Any]:
    """Score what has no score yet, and return `vbench_record`.

    Raises EvaluationError if VBench scored nothing at all: such a run has not succeeded.
    """
    scores, failures = score_missing(folder, plan, labels, vbench, progress)
    if failures and not any(scores.values()):
        raise EvaluationError(f"VBench scored no video; of {failures[0].dimension} it said: {failures[0].why}")
    return vbench_record(vbench, scores, failures, labels)


def vbench_record(vbench: VBench, scores: Scores, failures: Sequence[Failure], labels: Sequence[str]) -> dict[str, Any]:
    """Return plain values for JSON, the key `vbench` of evaluation.json.

    Args:
        labels: the reference first.
    """
    dimensions, by_label = vbench.settings.dimensions, {label: _by_item(scores, label) for label in labels}
    of_reference = by_label[labels[0]]
    # As in the summary of the other measures, a dimension that the reference lacks is in no mean.
    by_label = {label: _shared(values, of_reference) for label, values in by_label.items()}
    weights = {path: digest for name in dimensions for path, digest in vbench.weights[name].items()}
    return {
        **{"version" if name == "vbench" else name: version for name, version in vbench.versions.items()},
        "device": vbench.device,
        "dimensions": list(dimensions),
        "weights": [{"file": path, "sha256": digest} for path, digest in sorted(weights.items())],
        "models": {label: _model(values, of_reference, label == labels[0]) for label, values in by_label.items()},
        "summary": [
            row for label, values in by_label.items() for row in _rows(label, values, of_reference, label == labels[0])
        ],
        "failed": [
            {"dimension": failure.dimension, **(failure.take._asdict() if failure.take else {}), "why": failure.why}
            for failure in failures
        ],
    }


def _by_item(scores: Scores, label: str) -> dict[str, dict[str, float]]:
    return {
        dimension: mean_by_item((take.id, score) for take, score in found.items() if take.label == label)
        for dimension, found in scores.items()
    }


def _shared(values: ByItem, others: ByItem) -> dict[str, dict[str, float]]:
    return {name: {item: one for item, one in found.items() if item in others[name]} for name, found in values.items()}


def _model(values: ByItem, of_reference: ByItem, is_reference: bool) -> dict[str, Any]:
    raw = {name: _mean(found) for name, found in values.items()}
    drops: dict[str, Interval | None] = {}
    if not is_reference:
        drops = {name: relative_drop({name: values[name]}, {name: of_reference[name]}) for name in values}
    overall = None if is_reference else relative_drop(values, of_reference)
    return {
        "raw": raw,
        "normalised": {name: None if mean is None else DIMENSIONS[name].normalised(mean) for name, mean in raw.items()},
        "raw_mean": _mean(raw_mean_by_item(values)),
        "normalised_mean": _mean(normalised_mean_by_item(values)),
        "relative_drop_of": {
            name: None if drop is None else {"drop": drop.mean, "low": drop.low, "high": drop.high, "n": drop.n}
            for name, drop in drops.items()
        },
        "relative_drop": None if overall is None else overall.mean,
        "num_items": len(_in_all(values)),
    }


def _rows(label: str, values: ByItem, of_reference: ByItem, is_reference: bool) -> list[dict[str, Any]]:
    """Make rows in the form of evaluation.json's `summary`."""
    wanted = [(f"vbench_{name}", values[name], of_reference[name]) for name in values]
    wanted.append((RAW_MEAN, raw_mean_by_item(values), raw_mean_by_item(of_reference)))
    wanted.append((NORMALISED_MEAN, normalised_mean_by_item(values), normalised_mean_by_item(of_reference)))
    rows = [
        summary_row(label, name, METRICS[name], found, None if is_reference else reference)
        for name, found, reference in wanted
    ]
    drop = None if is_reference else relative_drop(values, of_reference)
    if drop is not None:
        rows.append(
            {
                "label": label,
                "metric": DROP,
                "mean": drop.mean,
                "reference_mean": None,
                "difference": None,
                "low": drop.low,
                "high": drop.high,
                "n": drop.n,
                "within_noise": drop.holds_zero,
                "words": _drop_words(drop),
            }
        )
    order = list(METRICS)
    return sorted((row for row in rows if row is not None), key=lambda row: order.index(row["metric"]))


def raw_mean_by_item(values: ByItem) -> dict[str, float]:
    """Average over the dimensions without weights, for items that have all of them: papers call it
    VBench's average.
    """
    return {item: math.fsum(found[item] for found in values.values()) / len(values) for item in _in_all(values)}


def normalised_mean_by_item(values: ByItem) -> dict[str, float]:
    """Average over the dimensions with VBench's bounds and weights (half for dynamic degree)."""
    total = math.fsum(DIMENSIONS[name].share for name in values)
    return {
        item: math.fsum(
            DIMENSIONS[name].share * DIMENSIONS[name].normalised(found[item]) for name, found in values.items()
        )
        / total
        for item in _in_all(values)
    }


def relative_drop(values: ByItem, of_reference: ByItem) -> Interval | None:
    """Compute (reference − model) / reference of each dimension's mean, and its unweighted mean
    over the dimensions.

    The ICME 2026 low-bit challenge counts the loss in this way. Items are resampled together for
    both models and all dimensions. It is None if the reference scores zero in a dimension, so that
    nothing can drop, or if no item is scored.
    """
    items = [item for item in _in_all(of_reference) if item in _in_all(values)]
    if not items:
        return None
    first, second = (
        np.array([[found[item] for item in items] for found in both.values()]) for both in (of_reference, values)
    )
    if (first.mean(axis=1) == 0).any():
        return None

    def drop(indices: NDArray[np.intp]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            each = 1 - second[:, indices].mean(axis=-1) / first[:, indices].mean(axis=-1)
        return np.asarray(each.mean(axis=0))

    return resampled_interval(drop, len(items))


def _in_all(values: ByItem) -> list[str]:
    """Return the items that every dimension scored, in order: a mean over fewer dimensions would be
    another number.
    """
    found = list(values.values())
    return [item for item in found[0] if all(item in other for other in found[1:])]


def _mean(values: Mapping[str, float]) -> float | None:
    return math.fsum(values.values()) / len(values) if values else None


def _drop_words(drop: Interval) -> str:
    """Describe a drop, such as "1.20 % lower than the reference (0.30 to 2.10, n = 24)"."""
    size, side = f"{abs(100 * drop.mean):.2f} %", "lower" if drop.mean >= 0 else "higher"
    if drop.low is None or drop.high is None:
        return f"{size} {side} than the reference (n = {drop.n}: no interval)"
    noise = ": within noise" if drop.holds_zero else ""
    interval = f"{100 * drop.low:.2f} to {100 * drop.high:.2f}, n = {drop.n}".replace("-", "−")
    return f"{size} {side} than the reference ({interval}){noise}"
