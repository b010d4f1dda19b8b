"""The tables for people, and the figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.denoiser.layers import KINDS
from benchmarks.denoiser.samples import SIGMAS

PANELS = {
    "network": "the network's output, every quantized layer in place",
    "single_layer": "a single layer's output, mean over all quantized layers",
}
"""The errors that are shown at each noise level: keys of `combine`, and their objects."""


def sigma_table(results: Sequence[Mapping[str, Any]], what: str) -> Table:
    """Make a table of one of PANELS at each noise level, and its mean over them."""
    table = _table(f"Relative error of {PANELS[what]}, at each sigma, %", results)
    table.add_column("bits a weight", justify="right")
    for heading in (*(f"{sigma:.2g}" for sigma in SIGMAS), "mean"):
        table.add_column(heading, justify="right")
    for result in results:
        at_each = [percent(found, with_deviation=False) for found in result[f"{what}_at_each_sigma"]]
        table.add_row(result["row"], f"{result['bits_per_weight']:.2f}", *at_each, percent(result[what]))
    return table


def kind_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table of layers' output errors by kind, mean over the noise levels, and the worst of
    all layers.
    """
    table = _table("Relative error of a single layer's output, mean over the sigmas, %", results)
    kinds = dict.fromkeys(KINDS.values())
    for heading in (*kinds, "worst layer"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for result in results:
        worst = result["worst_layer"]
        cells = [percent(result["kinds"][kind]) for kind in kinds]
        table.add_row(result["row"], *cells, f"{100 * worst['error']:.1f}", worst["name"].removeprefix("model."))
    return table


def percent(found: Mapping[str, Any], with_deviation: bool = True) -> str:
    """Write a `summary` as "12.3 ± 0.4", or without its deviation."""
    text = f"{100 * found['mean']:.1f}"
    return text if found["deviation"] is None or not with_deviation else f"{text} ± {100 * found['deviation']:.1f}"


def draw_error_against_sigma(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw a line for each row through its errors at the noise levels, with the standard deviation
    over seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, what in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for result in results:
            found = result[f"{what}_at_each_sigma"]
            means, bars = zip(*((100 * each["mean"], 100 * (each["deviation"] or 0)) for each in found), strict=True)
            axes.errorbar(SIGMAS, means, yerr=bars, label=result["row"], marker="o", capsize=3)
        axes.set(xscale="log", xlabel="sigma of the noise", ylabel="relative error, %", title=PANELS[what])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.suptitle("A pretrained U-Net in four bits, mean ± standard deviation over seeds")
    figure.savefig(file, dpi=120)


def _table(title: str, results: Sequence[Mapping[str, Any]]) -> Table:
    counts = sorted({result["network"]["n"] for result in results})
    caption = f"Lower is better; mean ± standard deviation over seeds, n = {', '.join(map(str, counts))}."
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    return table
