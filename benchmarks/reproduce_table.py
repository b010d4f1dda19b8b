"""The published claim beside the measurements, from evaluation.json alone. Missing measurements
have no number.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

PAPER = "arXiv 2605.27003"
MEMORY, VBENCH, IMAGING = "peak GPU memory", "VBench mean", "imaging quality"
CLAIMS = {MEMORY: -0.593, VBENCH: -0.009, IMAGING: -0.023}
"""Relative changes against the 16-bit model, on OpenS2V-Eval with Wan2.2-I2V-A14B."""

NO_GPU = "no GPU"
NO_VBENCH = "no VBench: give --vbench-python"
NOT_SCORED = "VBench did not score both models"

Row = dict[str, Any]


def rows_of(evaluation: Mapping[str, Any]) -> list[Row]:
    """Make a row for each claim and quantized model.

    "change" is relative to the reference, as are "low" and "high" if there is an interval over the
    items; "n" counts videos for memory, items for scores. Without a number, "why" gives the reason.
    """
    reference = evaluation["reference"]
    labels = [model["label"] for model in evaluation["models"] if model["label"] != reference]
    rows = []
    for label in labels:
        for claim, found in (
            (MEMORY, _memory(evaluation, reference, label)),
            (VBENCH, _score(evaluation, reference, label, "raw_mean")),
            (IMAGING, _score(evaluation, reference, label, "imaging_quality")),
        ):
            rows.append({"claim": claim, "published": CLAIMS[claim], "label": label, **found})
    return rows


def _memory(evaluation: Mapping[str, Any], reference: str, label: str) -> Row:
    """Return the largest of all phases and videos: a maximum has no interval."""
    peaks = []
    for name in (reference, label):
        model = next(model for model in evaluation["models"] if model["label"] == name)
        peaks.append(max(((model["memory"] or {}).get("peak_gpu_gib") or {}).values(), default=None))
    num_videos = sum(label in item["videos"] for item in evaluation["items"])
    return _row(*peaks, n=num_videos, why=NO_GPU)


def _score(evaluation: Mapping[str, Any], reference: str, label: str, name: str) -> Row:
    """Return one of VBench's scores; the interval, if any, is the paired difference's over the
    reference's mean.
    """
    vbench = evaluation["vbench"]
    if not vbench:
        return _row(None, None, why=NO_VBENCH)
    summary = next(
        (row for row in vbench.get("summary") or [] if row["label"] == label and row["metric"] == f"vbench_{name}"),
        None,
    )
    if summary is not None and summary["difference"] is not None:
        ends = [None if summary[end] is None else summary[end] / summary["reference_mean"] for end in ("low", "high")]
        return _row(summary["reference_mean"], summary["reference_mean"] + summary["difference"], ends, summary["n"])
    by_label = vbench.get("models", vbench)
    values = []
    for each in (reference, label):
        found = by_label.get(each) or {}
        values.append(found.get("raw_mean") if name == "raw_mean" else (found.get("raw") or {}).get(name))
    return _row(*values, n=(by_label.get(label) or {}).get("num_items"), why=NOT_SCORED)


def _row(
    reference: float | None,
    value: float | None,
    ends: Sequence[float | None] = (None, None),
    n: int | None = None,
    why: str = NOT_SCORED,
) -> Row:
    measured = reference is not None and value is not None and reference != 0
    return {
        "reference": reference if measured else None,
        "value": value if measured else None,
        "change": value / reference - 1 if measured else None,
        "low": ends[0],
        "high": ends[1],
        "n": n if measured else None,
        "why": None if measured else why,
    }


def measured_text(row: Row) -> str:
    """Write a change such as "−0.8 % (−1.4 to −0.2, n = 168)", or "not measured" and the reason."""
    if row["change"] is None:
        return f"not measured ({row['why']})"
    inside = [] if row["low"] is None or row["high"] is None else [f"{_percent(row['low'])} to {_percent(row['high'])}"]
    inside += [] if row["n"] is None else [f"n = {row['n']}"]
    return f"{_percent(row['change'])} %" + (f" ({', '.join(inside)})" if inside else "")


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def print_rows(rows: Sequence[Row], title: str) -> None:
    """Print a line a claim, a column a model."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        caption="Changes relative to the 16-bit model, with the same items, seeds and settings.",
    )
    for heading in ("", f"published, {PAPER}", *labels):
        table.add_column(heading)
    for claim, published in CLAIMS.items():
        found = {row["label"]: measured_text(row) for row in rows if row["claim"] == claim}
        table.add_row(claim, f"{_percent(published)} %", *(found[label] for label in labels))
    Console(width=140).print(table)
