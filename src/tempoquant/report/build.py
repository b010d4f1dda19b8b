"""The builder of one HTML file from evaluations: `build_report`.

The page makes no network request, and its Content-Security-Policy forbids any: the only script and
style that run are the two whose hashes it names. Prompts, labels and names come from other people's
files. jinja2 escapes them in the page, its `tojson` escapes them inside <script>, and the script
writes them with textContent alone.
"""

import base64
import hashlib
import statistics
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, StrictUndefined

from tempoquant.errors import EvaluationError
from tempoquant.evaluate.files import check_place, write_text
from tempoquant.progress import SILENT, Progress
from tempoquant.report import charts, headline, time_bars
from tempoquant.report.evaluation import read_evaluation
from tempoquant.report.media import Media
from tempoquant.report.merge import Part, merge
from tempoquant.report.metrics import TRAP, metric_of
from tempoquant.report.payload import payload_of
from tempoquant.report.time_bars import TimePart, read_times

BUDGET_MIB = 64
"""The size of the videos inside the page, as base64: a browser on a phone still opens it."""
SCRIPTS = ("panel.js", "players.js", "table.js", "maps.js", "page.js")
"""Concatenated in this order, the scripts are one module."""
NUM_COLOURS = 8
"""The model colours in page.css. The ninth model gets the first colour again, and always shows its
name.
"""


def build_report(
    folders: Sequence[Path],
    output: Path,
    budget_mib: float = BUDGET_MIB,
    progress: Progress | None = None,
    times: Path | None = None,
) -> dict[str, Any]:
    """Write one page about all `folders` that `tempoquant evaluate -o` wrote, whole or not at all.

    Args:
        output: the page, NAME.html. Videos beyond the budget go to the folder NAME_videos beside
            it.
        budget_mib: of embedded videos; 0 embeds none.
        times: what `tempoquant plan MODEL --time --json` printed; the page then shows where time
            goes.

    Returns:
        Plain values: the page, its bytes, items, and how many videos are inside and beside.

    Raises:
        EvaluationError: a folder holds no evaluation, a damaged one, or lacks a file that it names;
            or `times` is something else.
        OutputError: the page cannot be written there.
    """
    progress = progress or SILENT
    if not folders:
        raise EvaluationError("there is nothing to report on: name a folder that `tempoquant evaluate -o` wrote.")
    check_place(output, ".html")
    predicted = None if times is None else read_times(times)
    advance = progress.start("Reading evaluations", len(folders))
    evaluations = []
    for folder in folders:
        evaluations.append(read_evaluation(folder))
        advance()
    parts = merge(evaluations)
    media = Media(output.parent / f"{output.stem}_videos", int(budget_mib * 2**20))
    advance = progress.start("Embedding videos", len(parts))
    payloads = []
    for part in parts:
        payloads.append(payload_of(part, media))
        advance()
    write_text(output, _page(parts, payloads, media, predicted))
    return {
        "page": str(output),
        "num_bytes": output.stat().st_size,
        "num_items": sum(len(part.items) for part in parts),
        "models": [part.others for part in parts],
        "num_videos_inside": len(media.embedded),
        "num_videos_beside": media.num_beside,
        "folder_beside": str(media.beside) if media.num_beside else None,
    }


def _page(parts: Sequence[Part], payloads: Sequence[dict[str, Any]], media: Media, predicted: TimePart | None) -> str:
    source = files("tempoquant.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = source.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(source.joinpath(name).read_text(encoding="utf-8") for name in SCRIPTS)
    template = environment.from_string(source.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        policy=_policy(script, style, media.num_beside > 0),
        style=style,
        script=script,
        parts=[_context(part, payload) for part, payload in zip(parts, payloads, strict=True)],
        embedded=media.embedded,
        beside=media.beside.name if media.num_beside else None,
        num_beside=media.num_beside,
        trap=TRAP,
        metric_of=metric_of,
        no_interval=headline.NO_INTERVAL,
        num_colours=NUM_COLOURS,
        chart=charts,
        times=predicted,
        bars=time_bars,
    )


def _policy(script: str, style: str, has_files_beside: bool) -> str:
    """Return the Content-Security-Policy: it allows only this file and, if there are any, the
    videos beside it.
    """
    beside = " 'self' file:" if has_files_beside else ""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        f"media-src blob:{beside}; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _context(part: Part, payload: dict[str, Any]) -> dict[str, Any]:
    """Return the template's values for one part."""
    bits = {label: part.models[label].get("bits_per_weight") for label in part.labels}
    used = dict.fromkeys(row["metric"].partition(" ")[0] for row in [*part.summary, *part.vbench_summary])
    return {
        "part": part,
        "payload": payload,
        "headline": headline.headline(part),
        "by_bin": headline.by_bin(part),
        "charts": charts.charts_of(part.labels, bits, part.summary),
        "failures": [(item, label, why) for item in part.items for label, why in item.failed.items()],
        "metrics": [metric_of(key) for key in used],
        "recipes": {
            label: _toml(part.models[label]["recipe"]) for label in part.others if part.models[label].get("recipe")
        },
        "map_rows": [row for label in part.others for row in _map_rows(label, part.models[label].get("maps") or {})],
    }


def _toml(recipe: dict[str, Any]) -> str:
    """Write a recipe as `--recipe` reads it; TOML has no null, so a setting of None is left out."""
    return tomli_w.dumps({key: value for key, value in recipe.items() if value is not None})


def _map_rows(label: str, maps: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the heat maps in words: a row per denoiser and bin, the noisiest first, with medians
    and the worst layer.
    """
    rows = []
    for denoiser, heat in maps.items():
        for number in reversed(range(len(heat["bins"]))):
            errors = [
                (row[number], layer)
                for layer, row in zip(heat["layers"], heat["error_db"] or [], strict=False)
                if row[number] is not None
            ]
            ratios = [row[number] for row in heat["clip_ratio"] or [] if row[number] is not None]
            worst = max(errors, default=(None, None))
            rows.append(
                {
                    "label": label,
                    "denoiser": denoiser,
                    "bin": heat["bins"][number],
                    "median_error": statistics.median(error for error, _ in errors) if errors else None,
                    "worst_error": worst[0],
                    "worst_layer": worst[1],
                    "median_clip_ratio": statistics.median(ratios) if ratios else None,
                    "attention_fp16": _attention_error(heat, number, "int8_fp16"),
                    "attention_fp8": _attention_error(heat, number, "int8_fp8"),
                }
            )
    return rows


def _attention_error(heat: dict[str, Any], number: int, kind: str) -> float | None:
    """Return the median error of 8-bit attention in a timestep bin; None in evaluations of earlier
    versions.
    """
    attention = heat.get("attention") or {"layers": [], "error_db": []}
    named = zip(attention["layers"], attention["error_db"], strict=True)
    errors = [row[number] for name, row in named if name.endswith(kind) and row[number] is not None]
    return statistics.median(errors) if errors else None
