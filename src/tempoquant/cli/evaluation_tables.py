"""The results of `evaluate` as tables for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tempoquant.cli.tables import metrics_table
from tempoquant.cli.vbench_table import vbench_text
from tempoquant.evaluate.evaluation_folder import EVALUATION
from tempoquant.evaluate.metrics.measures import METRICS
from tempoquant.evaluate.summaries import metric_of


def evaluation_text(record: Mapping[str, Any], output: Path) -> RenderableType:
    """Return the tables of models, metrics with their intervals, comparisons between models, and
    notes.
    """
    parts: list[RenderableType] = [_models_table(record), _metrics_table(record)]
    shown = [row for row in record["pairs"] if " " not in row["metric"]]
    if shown:
        parts.append(_pairs_table(shown))
    if record.get("vbench") is not None:
        parts.extend(vbench_text(record["vbench"], output))
    benchmark, failed = record["benchmark"], [why for item in record["items"] for why in item["failed"].items()]
    if benchmark["skipped"]:
        first = benchmark["skipped"][0]
        parts.append(f"{len(benchmark['skipped'])} entries skipped, such as {first['id']}: {first['why']}")
    if benchmark["excluded_overlap"]:
        parts.append(f"{len(benchmark['excluded_overlap'])} items left out: a model was calibrated on them.")
    if failed:
        parts.append(f"{len(failed)} videos failed, such as one of {failed[0][0]}: {failed[0][1]}")
    notes = [Text(note, style="bold red" if "--allow-overlap" in note else "") for note in record["notes"]]
    return Group(*parts, *notes, f"Everything is in {output}, the numbers in {output / EVALUATION}.")


def _models_table(record: Mapping[str, Any]) -> Table:
    memory_mode = record["settings"]["memory"]
    title = f"Models, in memory mode {memory_mode}; medians of times, largest memory"
    has_speeds = any(model.get("speed") for model in record["models"])
    if has_speeds:
        title = f"{title}; rows with a speed are not W4A4 alone"
    table = Table(title=title, title_justify="left")
    measured = ("bits per weight", "s per step", "against the reference", "peak RSS, GiB", "peak GPU, GiB")
    for column in ("", *(["speed"] if has_speeds else []), *measured):
        table.add_column(column, justify="left" if column in ("", "speed") else "right")
    for model in record["models"]:
        memory, costs = model["memory"], model["costs"]
        on_gpu = max(memory["peak_gpu_gib"].values()) if memory["peak_gpu_gib"] else None
        times = (_median(costs["seconds_per_step"], 3), _median(costs["seconds_per_step_ratio"], 2, " ×"))
        largest = ("–" if number is None else f"{number:.2f}" for number in (memory["peak_rss_gib"], on_gpu))
        speed = [model.get("speed") or "every step"] if has_speeds else []
        table.add_row(model["label"], *speed, f"{model['bits_per_weight']:.2f}", *times, *largest)
    return table


def _median(found: Mapping[str, Any] | None, digits: int, unit: str = "") -> str:
    """Write a median such as "0.312 (0.305 to 0.330)"."""
    if found is None:
        return "–"
    median = f"{found['median']:.{digits}f}{unit}"
    return median if found["low"] is None else f"{median} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def _metrics_table(record: Mapping[str, Any]) -> Table:
    """Make a table with a row for each model's metric."""
    count = f"{record['benchmark']['num_items']} items × {len(record['settings']['seeds'])} seeds"
    order = list(METRICS)
    names = dict.fromkeys(row["metric"] for row in record["summary"])
    in_order = sorted(names, key=lambda name: order.index(name.partition(" ")[0]))
    words = {name: metric_of(name).words for name in in_order}
    title = f"{record['benchmark']['name']}, {count}; 95 % bootstrap intervals"
    return metrics_table(title, words, record["summary"])


def _pairs_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Models against each other", title_justify="left")
    for column in ("metric", "difference"):
        table.add_column(column)
    for row in rows:
        table.add_row(metric_of(row["metric"]).words, row["words"])
    return table
