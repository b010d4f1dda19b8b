"""The table of `quantize --dry-run`: the needs of each stage of a run."""

from typing import Any

from rich.table import Table

from tempoquant.cli.progress import duration_text
from tempoquant.cli.tables import MIN_WIDTH, NOT_MEASURED, format_bytes
from tempoquant.planning.run_estimate import RunEstimate


def plan_table(estimate: RunEstimate, title: str = "What this run will need (estimate)") -> Table:
    """Make a table with a row for each stage and for the whole run, with a column for GPU memory if
    a GPU computes.
    """
    on_gpu = any(stage.peak_gpu_gib for stage in estimate.stages)
    table = Table(title=title, title_justify="left", min_width=MIN_WIDTH)
    table.add_column("stage")
    for heading in ("time", "memory", *(["GPU memory"] if on_gpu else []), "on the disk by then"):
        table.add_column(heading, justify="right")
    for stage in estimate.stages:
        gpu = [_gib_text(stage.peak_gpu_gib)] if on_gpu else []
        table.add_row(
            stage.name, _time_text(stage.seconds), _gib_text(stage.peak_memory_gib), *gpu, _gib_text(stage.disk_gib)
        )
    table.add_section()
    gpu = [_gib_text(max(stage.peak_gpu_gib for stage in estimate.stages))] if on_gpu else []
    name = "all, all denoisers at once" if estimate.side_by_side else "all"
    table.add_row(
        name,
        _time_text(estimate.total_seconds),
        _gib_text(estimate.peak_memory_gib),
        *gpu,
        _gib_text(estimate.peak_disk_gib),
    )
    return table


def plan_record(estimate: RunEstimate) -> dict[str, Any]:
    """Return the same table as plain values, for --json."""
    stages = [
        {
            "name": stage.name,
            "seconds": stage.seconds,
            "peak_memory_gib": stage.peak_memory_gib,
            "peak_gpu_gib": stage.peak_gpu_gib,
            "disk_gib": stage.disk_gib,
        }
        for stage in estimate.stages
    ]
    return {
        "stages": stages,
        "side_by_side": estimate.side_by_side,
        "total_seconds": estimate.total_seconds,
        "peak_memory_gib": estimate.peak_memory_gib,
        "peak_disk_gib": estimate.peak_disk_gib,
    }


def _time_text(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else duration_text(seconds)


def _gib_text(value: float) -> str:
    return format_bytes(round(value * 2**30))
