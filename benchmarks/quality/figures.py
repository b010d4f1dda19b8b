"""The figures: error against bits a weight, and maps of clip ratio and error over layers and
timestep bins.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.maps import bin_names, mean_map
from benchmarks.quality.table import DENOISERS

MARKERS = "osD^v<>Ph*X"
COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#dd7722", "#225555", "#000000")
_MAPS = (("clip_ratio", "clip ratio", "viridis"), ("sqnr_db", "output SQNR, dB", "magma"))
_TITLES = {
    "high_noise": "noise prediction, high-noise denoiser",
    "low_noise": "noise prediction, low-noise denoiser",
    "final_latent": "final latent of a generation",
}


def draw_error_against_bits(results: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Draw a line a method (through its ranks, in each format), a panel for each denoiser and one
    for the final latent.
    """
    shown = [r for r in results if not r.get("error") and r.get("format") and r.get("bits_per_weight")]
    methods = list(dict.fromkeys(r["method"] for r in shown))
    formats = list(dict.fromkeys(r["format"] for r in shown))
    figure = Figure(figsize=(16, 6), layout="constrained")
    axes = figure.subplots(1, 3)
    for panel, what in zip(axes, _TITLES, strict=True):
        for number, method in enumerate(methods):
            for marker, format in zip(MARKERS, formats, strict=False):
                alike = [r for r in shown if r["method"] == method and r["format"] == format]
                _draw_line(panel, alike, what, COLORS[number % len(COLORS)], marker)
        panel.set(title=_TITLES[what], xlabel="bits a weight, all that is stored", ylabel="SQNR, dB (higher is better)")
        panel.grid(alpha=0.3)
    for number, method in enumerate(methods):
        axes[0].plot([], [], color=COLORS[number % len(COLORS)], label=method)
    for marker, format in zip(MARKERS, formats, strict=False):
        axes[0].plot([], [], color="black", marker=marker, linestyle="", label=format)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _draw_line(panel: Axes, results: Sequence[Mapping[str, Any]], what: str, color: str, marker: str) -> None:
    points = []
    for result in results:
        found = result.get("final_latent_db") if what == "final_latent" else result.get("sqnr_db", {}).get(what)
        if found and found.get("mean") is not None and math.isfinite(float(found["mean"])):
            points.append((result["bits_per_weight"], float(found["mean"]), float(found.get("standard_error") or 0)))
    if points:
        bits, means, errors = zip(*sorted(points), strict=True)
        panel.errorbar(bits, means, yerr=errors, color=color, marker=marker, markersize=5, linewidth=1.2, capsize=2)


def draw_maps(label: str, records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw layers down, timestep bins across: clip ratio and SQNR of each layer's output, for all
    denoisers.

    Args:
        records: the row's results, one a seed; the mean over them is drawn.
    """
    maps = {denoiser: [record["maps"][denoiser] for record in records] for denoiser in DENOISERS}
    num_layers = max(len(found[0]["layers"]) for found in maps.values())
    figure = Figure(figsize=(15, 2.2 + 0.19 * num_layers), layout="constrained")
    panels = figure.subplots(1, 4)
    for column, (key, what, colors) in enumerate(_MAPS):
        values = {denoiser: mean_map(found, key) for denoiser, found in maps.items()}
        finite = [v for rows in values.values() for row in rows for v in row if math.isfinite(v)] or [0.0, 1.0]
        for panel, denoiser in zip(panels[column::2], DENOISERS, strict=True):  # both in the same colours
            image = panel.imshow(
                values[denoiser], aspect="auto", cmap=colors, vmin=min(finite, default=0), vmax=max(finite, default=1)
            )
            figure.colorbar(image, ax=panel, location="bottom", label=what, fraction=0.03)
            panel.set_title(f"{denoiser}: {what}", fontsize=10)
            names, layers = bin_names(maps[denoiser][0]["edges"]), maps[denoiser][0]["layers"]
            panel.set_xticks(range(len(names)), names, fontsize=7)
            panel.set_yticks(range(len(layers)), layers if column == 0 else [""] * len(layers), fontsize=6)
    figure.suptitle(f"{label}: every layer in every timestep bin, seeds: {len(records)}")
    figure.savefig(file, dpi=120)


def file_name(label: str) -> str:
    """Convert a label to a part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")
