"""What `evaluate` found, for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tempoquant.cli.vbench_table import vbench_text
from tempoquant.evaluate.evaluation_folder import EVALUATION
from tempoquant.evaluate.measures import METRICS
from tempoquant.evaluate.summaries import metric_of


def evaluation_text(record: Mapping[str, Any], output: Path) -> RenderableType:
    """Models, metrics with their intervals, comparisons between models, and what one should know."""
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
    table = Table(title="Models", title_justify="left")
    for column in ("", "bits per weight", "s per step", "peak RSS, GiB", "peak GPU, GiB"):
        table.add_column(column, justify="left" if not column else "right")
    for model in record["models"]:
        memory = model["memory"]
        on_gpu = max(memory["peak_gpu_gib"].values()) if memory["peak_gpu_gib"] else None
        numbers = (model["bits_per_weight"], model["seconds_per_step"], memory["peak_rss_gib"], on_gpu)
        table.add_row(model["label"], *("–" if number is None else f"{number:.2f}" for number in numbers))
    return table


def _metrics_table(record: Mapping[str, Any]) -> Table:
    """A row for each model's metric."""
    count = f"{record['benchmark']['num_items']} items × {len(record['settings']['seeds'])} seeds"
    table = Table(title=f"{record['benchmark']['name']}, {count}; 95 % bootstrap intervals", title_justify="left")
    for column in ("metric", "model", "mean, or difference"):
        table.add_column(column)
    order = list(METRICS)
    names = dict.fromkeys(row["metric"] for row in record["summary"])
    for name in sorted(names, key=lambda name: order.index(name.partition(" ")[0])):
        title = metric_of(name).words
        for row in record["summary"]:
            if row["metric"] == name:
                table.add_row(title, row["label"], row["words"])
                title = ""
        table.add_section()
    return table


def _pairs_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Models against each other", title_justify="left")
    for column in ("metric", "difference"):
        table.add_column(column)
    for row in rows:
        table.add_row(metric_of(row["metric"]).words, row["words"])
    return table
