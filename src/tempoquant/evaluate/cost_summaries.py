"""The cost of a model's videos, with its spread: seconds a step, and memory.

Times are medians over items with 95 % bootstrap intervals. Times of a model and of the reference
are paired by item, which removes the cost of an item common to both; pairs are of one kind of
device. Memory is not a sample: the video with the most counts, and the least is given beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tempoquant.evaluate.evaluation_folder import Take
from tempoquant.evaluate.metrics.statistics import Median, mean_by_item, median_interval

Lines = Mapping[Take, Mapping[str, Any]]

ON_CPU = (
    "Times were taken on a CPU, where other work slows a video down, and where 4-bit linears run by "
    "the kernels' definition in plain PyTorch: they say nothing about a GPU."
)


def costs_of(lines: Lines, label: str, reference: str) -> dict[str, Any]:
    """Return plain values, None for missing measurements.

    "seconds_per_step" is {"median", "low", "high", "n"} over items (the seeds of one averaged
    first), "seconds_per_step_ratio" the same of model over reference, item by item, above 1 slower;
    None for the reference. "peak_rss_gib" is {"most", "least", "n"} over videos, "peak_gpu_gib"
    that by phase.

    Args:
        lines: of the manifest, by take.
    """
    finished = {take: line for take, line in lines.items() if not line.get("failed")}
    of_model = [line for take, line in finished.items() if take.label == label]
    seconds, of_reference = _seconds(finished, label), _seconds(finished, reference)
    ratios = mean_by_item(
        (item, value / of_reference[item, device])
        for (item, device), value in seconds.items()
        if of_reference.get((item, device))
    )
    by_item = mean_by_item((item, value) for (item, _), value in seconds.items())
    phases = dict.fromkeys(phase for line in of_model for phase in line["peak_gpu_gib"] or {})
    on_gpu = {
        phase: _spread([line["peak_gpu_gib"][phase] for line in of_model if phase in (line["peak_gpu_gib"] or {})])
        for phase in phases
    }
    return {
        "seconds_per_step": _plain(median_interval(list(by_item.values()))),
        "seconds_per_step_ratio": None if label == reference else _plain(median_interval(list(ratios.values()))),
        "peak_rss_gib": _spread([line["peak_rss_gib"] for line in of_model if line["peak_rss_gib"] is not None]),
        "peak_gpu_gib": on_gpu or None,
    }


def notes(device: str) -> list[str]:
    """Return notes for readers of the times."""
    return [ON_CPU] if torch.device(device).type == "cpu" else []


def _seconds(lines: Lines, label: str) -> dict[tuple[str, str | None], float]:
    """Average seconds over the seeds of each item and kind of device."""
    return mean_by_item(
        ((take.id, line.get("device")), line["seconds_per_step"])
        for take, line in lines.items()
        if take.label == label and line["seconds_per_step"] is not None
    )


def _spread(values: Sequence[float]) -> dict[str, Any] | None:
    return {"most": max(values), "least": min(values), "n": len(values)} if values else None


def _plain(found: Median | None) -> dict[str, Any] | None:
    return None if found is None else {"median": found.median, "low": found.low, "high": found.high, "n": found.n}
