"""Tables for people: the measurements of `compare` and `demo`, the content that `inspect` found."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tempoquant.evaluate.results import Comparison, ModelResult, Summary
from tempoquant.hosts.contents import Contents, DenoiserContents

if TYPE_CHECKING:
    from tempoquant.hosts.comfyui.nvfp4_export import ExportedDenoiser

NOT_MEASURED = "–"
MIN_WIDTH = 72
"""Characters; a table as narrow as its columns would break its title into many lines."""


def comparison_table(comparison: Comparison) -> Table:
    """Make a table with a column per model, which fits a narrow terminal. Rows without any
    measurement are left out.
    """
    results = [comparison.reference, *comparison.models]
    rows = [
        ("bits per weight", [f"{result.bits_per_weight:.2f}" for result in results]),
        ("denoisers on disk", [format_bytes(result.num_bytes) for result in results]),
        *((f"SQNR of {name}, dB", [_text(r.denoiser_sqnr_db(name)) for r in results]) for name in _denoisers(results)),
        ("SQNR of text embeddings, dB", [_text(result.embedding_db) for result in results]),
        ("PSNR, dB", [_text(result.psnr_db) for result in results]),
        ("SSIM", [_text(result.ssim, 3) for result in results]),
        ("motion followed", [_share(result.motion_followed) for result in results]),
        ("appearance kept", [_share(result.appearance_kept) for result in results]),
    ]
    table = Table(title=_comparison_title(comparison), title_justify="left", min_width=MIN_WIDTH)
    table.add_column("")
    for result in results:
        table.add_column(result.label, justify="right")
    for name, cells in rows:
        if any(cell != NOT_MEASURED for cell in cells):
            table.add_row(name, *cells)
    return table


def bins_table(comparison: Comparison) -> Table | None:
    """Make a table of the noise prediction's SQNR: a row per timestep bin, the noisiest first, and
    a column per model.

    It is None if no denoiser has several bins.
    """
    by_model = [[e for e in model.noise_prediction if e.bin_index is not None] for model in comparison.models]
    if not any(by_model):
        return None
    table = Table(title="SQNR of the noise prediction per timestep bin, dB", title_justify="left", min_width=MIN_WIDTH)
    table.add_column("expert")
    table.add_column("timesteps", justify="right")
    for model in comparison.models:
        table.add_column(model.label, justify="right")
    rows = list(zip(*by_model, strict=True))  # all models were measured on the same calls and bins
    for denoiser in _denoisers(comparison.models):
        for errors in reversed([row for row in rows if row[0].denoiser == denoiser]):
            low, high = errors[0].timesteps
            table.add_row(denoiser, f"{low:.0f} … {high:.0f}", *(error.sqnr_db.text() for error in errors))
    return table


def _denoisers(results: Sequence[ModelResult]) -> list[str]:
    """Return the denoisers with measured noise predictions, the noisiest first."""
    return list(dict.fromkeys(errors.denoiser for result in results for errors in result.noise_prediction))


def contents_table(contents: Contents) -> Table:
    """Make a table with a column per denoiser."""
    table = Table(title=_contents_title(contents), title_justify="left", min_width=MIN_WIDTH)
    table.add_column("")
    for denoiser in contents.denoisers:
        table.add_column(denoiser.denoiser, justify="right")
    rows = [
        ("4-bit linears", [str(denoiser.num_layers) for denoiser in contents.denoisers]),
        ("16-bit linears", [str(denoiser.num_16bit_linears) for denoiser in contents.denoisers]),
        ("format", [_counts(denoiser.formats) for denoiser in contents.denoisers]),
        ("rank", [_counts(denoiser.ranks) for denoiser in contents.denoisers]),
        ("bits per weight", [f"{denoiser.bits_per_weight:.2f}" for denoiser in contents.denoisers]),
        ("size", [format_bytes(denoiser.num_bytes) for denoiser in contents.denoisers]),
        ("clip ratio by timesteps", ["\n".join(_bin_lines(denoiser)) for denoiser in contents.denoisers]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def comfyui_table(denoisers: Sequence["ExportedDenoiser"]) -> Table:
    """Make a table with a row per file that was written for ComfyUI."""
    table = Table(title="For ComfyUI's folder models", title_justify="left", min_width=MIN_WIDTH)
    for heading in ("denoiser", "file"):
        table.add_column(heading, overflow="fold")
    for heading in ("4-bit linears", "bits per weight", "size"):
        table.add_column(heading, justify="right")
    for each in denoisers:
        bits, size = f"{each.bits_per_weight:.2f}", format_bytes(each.num_bytes)
        table.add_row(each.denoiser, each.model_file, str(each.num_layers), bits, size)
        if each.branch_file is not None:
            table.add_row("", each.branch_file)
    return table


def text_encoder_lines(contents: Contents) -> list[str]:
    """Return a sentence for each quantized text encoder."""
    return [
        f"{each.component}: linears in {each.format}, {format_bytes(each.num_bytes)}; {each.loss_in_words()} "
        f"Loading it needs {each.needs}."
        for each in contents.text_encoders
    ]


def hardly_seen_lines(contents: Contents) -> list[str]:
    """Return a sentence for each denoiser with input features that calibration hardly saw."""
    lines = []
    for denoiser in contents.denoisers:
        if not (layers := denoiser.hardly_seen):
            continue
        count = sum(seen.num_features for seen in layers.values())
        most = max(layers, key=lambda name: layers[name].num_features)
        factor = max(seen.amplification for seen in layers.values())
        lines.append(
            f"{denoiser.denoiser}: calibration hardly saw {count} input features of {len(layers)} layers, most in "
            f"{most} ({layers[most].num_features}). An ordinary value in one reaches the quantizer up to {factor:.3g} "
            "times as large as elsewhere. Calibrate with more prompts to see more."
        )
    return lines


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes such as "12.4 MiB"."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _comparison_title(comparison: Comparison) -> str:
    num_prompts = len(comparison.prompts)
    measured = [error.sqnr_db.num_values for model in comparison.models for error in model.noise_prediction]
    fewer = f" (SQNR on {max(measured)} of them)" if measured and max(measured) < num_prompts else ""
    prompts = f"{num_prompts} held-out prompt{'s' if num_prompts > 1 else ''}"
    return f"{prompts}{fewer}, seed {comparison.seed}; mean ± standard deviation"


def _contents_title(contents: Contents) -> str:
    count = len(contents.calibration_prompt_ids)
    calibrated = f"calibrated on {count} prompt{'s' if count > 1 else ''}" if count else "not calibrated"
    size = f"{contents.bits_per_weight:.2f} bits per weight, {format_bytes(contents.num_bytes)}"
    return f"{contents.folder}: recipe {contents.recipe['name']}, {size}, {calibrated}"


def _bin_lines(denoiser: DenoiserContents) -> list[str]:
    """Return a line per bin, the noisiest first, in sampling order: median and range of the clip
    ratio over layers.
    """
    lines = []
    for each in reversed(denoiser.bins):
        spread = f" ({each.clip_ratio_min:g}–{each.clip_ratio_max:g})"
        has_spread = each.clip_ratio_min < each.clip_ratio_max
        timesteps = f"{each.lowest_timestep:g}–{each.highest_timestep:g}"
        lines.append(f"{timesteps}: {each.clip_ratio_median:g}{spread if has_spread else ''}")
    return lines or [NOT_MEASURED]


def _counts(counts: object) -> str:
    """Write "mxfp4", or "mxfp4 × 396, int4 × 4" if there are several."""
    pairs = dict(counts)  # type: ignore[call-overload]
    return str(next(iter(pairs))) if len(pairs) == 1 else ", ".join(f"{key} × {count}" for key, count in pairs.items())


def _text(summary: Summary | None, digits: int = 1) -> str:
    return NOT_MEASURED if summary is None else summary.text(digits)


def _share(summary: Summary | None) -> str:
    """Write a share of videos as a count, such as "5 of 6"."""
    return NOT_MEASURED if summary is None else f"{round(summary.mean * summary.num_values)} of {summary.num_values}"


def metrics_table(title: str, words: Mapping[str, str], summary: Iterable[Mapping[str, Any]]) -> Table:
    """Make a table with a section for each metric, and in it a row for each model.

    Args:
        words: the title of each metric, by its name, in the order of the table.
        summary: rows of evaluation.json's `summary`.
    """
    table = Table(title=title, title_justify="left")
    for column in ("metric", "model", "mean, or difference"):
        table.add_column(column)
    for name, heading in words.items():
        of_metric = [row for row in summary if row["metric"] == name]
        for number, row in enumerate(of_metric):
            table.add_row("" if number else heading, row["label"], row["words"])
        table.add_section()
    return table
