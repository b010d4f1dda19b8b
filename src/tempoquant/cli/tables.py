"""Tables for people: what `compare` and `demo` measured, what `inspect` found."""

from rich.table import Table

from tempoquant.evaluate.contents import Contents, ExpertContents
from tempoquant.evaluate.results import Comparison, Summary
from tempoquant.timesteps import Expert

NOT_MEASURED = "–"


def comparison_table(comparison: Comparison) -> Table:
    """One row per model. A column that nothing was measured for is left out."""
    results = [comparison.reference, *comparison.models]
    columns = [
        ("bits / weight", [f"{result.bits_per_weight:.2f}" for result in results]),
        ("experts on disk", [format_bytes(result.num_bytes) for result in results]),
        *((f"SQNR {expert.value}, dB", [_text(r.expert_sqnr_db(expert)) for r in results]) for expert in Expert),
        ("PSNR, dB", [_text(result.psnr_db) for result in results]),
        ("SSIM", [_text(result.ssim, 3) for result in results]),
        ("motion followed", [_share(result.motion_followed) for result in results]),
        ("appearance kept", [_share(result.appearance_kept) for result in results]),
    ]
    table = Table(title=_comparison_title(comparison), title_justify="left")
    table.add_column("model")
    shown = [(name, cells) for name, cells in columns if any(cell != NOT_MEASURED for cell in cells)]
    for name, _ in shown:
        table.add_column(name, justify="right")
    for row, result in enumerate(results):
        table.add_row(result.label, *(cells[row] for _, cells in shown))
    return table


def bins_table(comparison: Comparison) -> Table | None:
    """SQNR of the noise prediction: a row per timestep bin, the noisiest first, and a column per model.

    None where no expert has several bins.
    """
    by_model = [[e for e in model.noise_prediction if e.bin_index is not None] for model in comparison.models]
    if not any(by_model):
        return None
    table = Table(title="SQNR of the noise prediction per timestep bin, dB", title_justify="left")
    table.add_column("expert")
    table.add_column("timesteps", justify="right")
    for model in comparison.models:
        table.add_column(model.label, justify="right")
    rows = list(zip(*by_model, strict=True))  # all models were measured on the same calls and bins
    for expert in Expert:
        for errors in reversed([row for row in rows if row[0].expert is expert]):
            low, high = errors[0].timesteps
            table.add_row(expert.value, f"{low:.0f} … {high:.0f}", *(error.sqnr_db.text() for error in errors))
    return table


def contents_table(contents: Contents) -> Table:
    """One row per expert and timestep bin."""
    recipe = contents.recipe
    table = Table(
        title=f"{contents.folder}: recipe {recipe['name']}, {contents.bits_per_weight:.2f} bits / weight, "
        f"{format_bytes(contents.num_bytes)}, {_calibrated_on(contents)}",
        title_justify="left",
    )
    right = {"4-bit linears", "16-bit linears", "rank", "bits / weight", "size", "timesteps", "clip ratio"}
    for name in (
        "expert",
        "4-bit linears",
        "16-bit linears",
        "format",
        "rank",
        "bits / weight",
        "size",
        "timesteps",
        "clip ratio",
    ):
        table.add_column(name, justify="right" if name in right else "left")
    for expert in contents.experts:
        for number, (timesteps, clip_ratio) in enumerate(_bin_cells(expert)):
            cells = _expert_cells(expert) if number == 0 else [""] * 7
            table.add_row(*cells, timesteps, clip_ratio, end_section=number == len(expert.bins) - 1)
    return table


def format_bytes(num_bytes: int) -> str:
    """Such as "12.4 MiB"."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _comparison_title(comparison: Comparison) -> str:
    num_prompts = len(comparison.prompts)
    measured = [error.sqnr_db.num_values for model in comparison.models for error in model.noise_prediction]
    fewer = f" (SQNR on {max(measured)} of them)" if measured and max(measured) < num_prompts else ""
    return f"{num_prompts} held-out prompts{fewer}, seed {comparison.seed}; mean ± standard deviation"


def _expert_cells(expert: ExpertContents) -> list[str]:
    return [
        expert.expert.value,
        str(expert.num_layers),
        str(expert.num_16bit_linears),
        _counts(expert.formats),
        _counts(expert.ranks),
        f"{expert.bits_per_weight:.2f}",
        format_bytes(expert.num_bytes),
    ]


def _bin_cells(expert: ExpertContents) -> list[tuple[str, str]]:
    """(timesteps, clip ratio: median and range over layers) per bin, the noisiest first, as sampling meets them."""
    cells = []
    for each in reversed(expert.bins):
        spread = f" ({each.clip_ratio_min:g} … {each.clip_ratio_max:g})"
        has_spread = each.clip_ratio_min < each.clip_ratio_max
        ratio = f"{each.clip_ratio_median:g}{spread if has_spread else ''}"
        cells.append((f"{each.lowest_timestep:g} … {each.highest_timestep:g}", ratio))
    return cells or [(NOT_MEASURED, NOT_MEASURED)]


def _counts(counts: object) -> str:
    """ "mxfp4", or "mxfp4 × 396, int4 × 4" where there are several."""
    pairs = dict(counts)  # type: ignore[call-overload]
    return str(next(iter(pairs))) if len(pairs) == 1 else ", ".join(f"{key} × {count}" for key, count in pairs.items())


def _calibrated_on(contents: Contents) -> str:
    count = contents.num_calibration_prompts
    return f"calibrated on {count} prompts" if count else "not calibrated"


def _text(summary: Summary | None, digits: int = 1) -> str:
    return NOT_MEASURED if summary is None else summary.text(digits)


def _share(summary: Summary | None) -> str:
    """A share of videos as a count, such as "5 of 6"."""
    return NOT_MEASURED if summary is None else f"{round(summary.mean * summary.num_values)} of {summary.num_values}"
