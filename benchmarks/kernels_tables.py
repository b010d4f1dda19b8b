"""What benchmarks.kernels prints: the computed table, and the measured ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.kernels_roofline import RANK, Rates, block_floors, floors, multiply
from benchmarks.registry import shapes_of_block


def roofline_table(video_tokens: Sequence[int], rates: Rates) -> Table:
    """Least times of every shape, and of a block."""
    table = Table(
        title=f"Computed, not measured: least times at the rates of {rates.name} ({rates.bf16_flops / 1e12:g} TFLOP/s "
        f"BF16, {rates.fp8_flops / 1e12:g} FP8, {rates.bytes_per_s / 1e12:g} TB/s), rank {RANK}",
        title_justify="left",
    )
    for name in ("tokens × in → out", "TFLOP", "GB", "BF16, ms", "project", "quantize", "expand", "multiply", "ours"):
        table.add_column(name, justify="right")
    table.add_column("BF16 / ours", justify="right")
    for tokens in video_tokens:
        for shape in shapes_of_block(tokens):
            floor, work = floors(shape, rates), multiply(shape)
            parts = (floor.bf16, floor.project, floor.quantize, floor.expand, floor.multiply, floor.alone)
            table.add_row(
                str(shape), f"{work.flops / 1e12:.3g}", f"{work.bytes / 1e9:.2f}",
                *(f"{1e3 * part:.3f}" for part in parts), f"{floor.bf16 / floor.alone:.2f}",
            )  # fmt: skip
        bf16, ours = block_floors(tokens, rates)
        ends = (f"{1e3 * ours:.2f}", f"{bf16 / ours:.2f}")
        table.add_row(f"a block of {tokens:,}", "", "", f"{1e3 * bf16:.2f}", *[""] * 4, *ends, end_section=True)
    return table


def measured_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a method: milliseconds of its stages, rate, share of the measured peak, ratio to BF16."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("quantize", "GB/s", "of a copy", "expand", "multiply", "TFLOP/s", "of peak", "whole, ms", "BF16 / it",
                 "error"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        if "note" in row:
            table.add_row(row["method"], row["note"])
            continue
        table.add_row(
            row["method"], _ms(row.get("quantize_ms")), _number(row.get("quantize_gb_per_s"), ".0f"),
            _number(row.get("quantize_of_copy"), ".0%"), _ms(row.get("expand_ms")), _ms(row.get("multiply_ms")),
            _number(row.get("tflop_per_s"), ".0f"), _number(row.get("of_peak"), ".0%"), _ms(row["whole_ms"]),
            f"{row['ratio_to_bf16']:.2f}", _number(row.get("error"), ".1e"),
        )  # fmt: skip
    return table


def block_table(title: str, totals: Mapping[str, Mapping[str, float]]) -> Table:
    """Totals of a block's ten linears by method."""
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
