"""The tables of benchmarks.kernels' measurements."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def measured_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table with a row a method: milliseconds of its stages, rate, share of the measured
    peak, ratio to BF16.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in (
        "quantize",
        "GB/s",
        "of a copy",
        "expand",
        "multiply",
        "TFLOP/s",
        "of peak",
        "whole, ms",
        "BF16 / it",
        "error",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        if "note" in row:
            table.add_row(row["method"], row["note"])
            continue
        table.add_row(
            row["method"],
            _ms(row.get("quantize_ms")),
            _number(row.get("quantize_gb_per_s"), ".0f"),
            _number(row.get("quantize_of_copy"), ".0%"),
            _ms(row.get("expand_ms")),
            _ms(row.get("multiply_ms")),
            _number(row.get("tflop_per_s"), ".0f"),
            _number(row.get("of_peak"), ".0%"),
            _ms(row["whole_ms"]),
            f"{row['ratio_to_bf16']:.2f}",
            _number(row.get("error"), ".1e"),
        )
    return table


def block_table(title: str, totals: Mapping[str, Mapping[str, float]]) -> Table:
    """Make a table of a block's ten linears by method, in total."""
    table = Table(title=title, title_justify="left")
    for name in ("method", "ten linears, ms", "BF16 / it"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method, total in totals.items():
        table.add_row(method, f"{total['ms']:.2f}", f"{total['ratio_to_bf16']:.2f}")
    return table


def _ms(value: float | None) -> str:
    return _number(value, ".3f")


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
