"""The table for people."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

DENOISERS = ("high_noise", "low_noise")


def print_tables(results: Sequence[Mapping[str, Any]], title: str, against: str | None, console: Console) -> None:
    """Print the measurements of every row, then the videos of the rows that have some."""
    console.print(quality_table(results, title, against))
    if any("videos" in result for result in results):
        console.print(video_table(results))


def quality_table(results: Sequence[Mapping[str, Any]], title: str, against: str | None = None) -> Table:
    """Make a table of bits, SQNR of the noise prediction per denoiser, SQNR of the final latent,
    seconds; failed rows have the reason.
    """
    caption = f"SQNR in dB, mean ± standard error over seeds × prompts ({_counts(results)}); higher is better."
    if against:
        caption += f" Δ: paired difference to {against}."
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    differs = [f"Δ {name}" for name in (*DENOISERS, "final latent")] if against else []
    for heading in ("bits a weight", *DENOISERS, "final latent", *differs, "s to quantize"):
        table.add_column(heading, justify="right")
    table.add_column("")
    previous = None
    for result in results:
        if previous not in (None, result.get("format")):
            table.add_section()
        previous = result.get("format")
        table.add_row(*_cells(result, bool(against)))
    return table


def video_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table of PSNR and SSIM against the 16-bit video, and of prompt adherence, for the
    decoded rows.
    """
    caption = "PSNR and SSIM against the 16-bit pipeline's videos, mean ± standard error over seeds × prompts."
    table = Table(title="Decoded videos", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for heading in ("PSNR, dB", "SSIM", "motion followed", "appearance kept", "n"):
        table.add_column(heading, justify="right")
    for result in results:
        if "videos" in result:
            found = result["videos"]
            shares = [_share(found.get(key)) for key in ("motion_followed", "appearance_kept")]
            table.add_row(
                result["row"], _text(found["psnr_db"]), _text(found["ssim"], 4), *shares, str(found["ssim"]["n"])
            )
    return table


def _cells(result: Mapping[str, Any], with_difference: bool) -> list[str]:
    bits = "" if result.get("bits_per_weight") is None else f"{result['bits_per_weight']:.2f}"
    numbers = [_text(result.get("sqnr_db", {}).get(denoiser)) for denoiser in DENOISERS]
    numbers.append(_text(result.get("final_latent_db")))
    if with_difference:
        found = result.get("difference_db", {})
        numbers += [_text(found.get(key), signed=True) for key in (*DENOISERS, "final_latent")]
    seconds = "" if result.get("seconds") is None else f"{result['seconds']:.0f}"
    note = f"failed: {result['error']}" if result.get("error") else result.get("note") or ""
    return [_label(result), bits, *numbers, seconds, note]


def _label(result: Mapping[str, Any]) -> str:
    """Return a row's label; peers name their rows without format and rank."""
    if result.get("group") != "peer":
        return str(result["row"])
    rank = f"rank {result['rank']}" if result.get("rank") else None
    return ", ".join(str(part) for part in (result["row"], result.get("format"), rank) if part)


def _text(summary: Mapping[str, Any] | None, digits: int = 2, signed: bool = False) -> str:
    """Write a summary such as "21.30 ± 0.12"."""
    if not summary or summary.get("mean") is None:
        return ""
    mean = float(summary["mean"])
    if math.isinf(mean):
        return "identical" if mean > 0 else "−inf"
    error = summary.get("standard_error")
    spread = "" if error is None else f" ± {float(error):.{digits}f}"
    return f"{mean:{'+' if signed else ''}.{digits}f}{spread}"


def _share(summary: Mapping[str, Any] | None) -> str:
    return "" if summary is None else f"{summary['mean']:.0%}"


def _counts(results: Sequence[Mapping[str, Any]]) -> str:
    """Write counts such as "n = 24" or "n = 8 or 24"."""
    counts = sorted({r["final_latent_db"]["n"] for r in results if (r.get("final_latent_db") or {}).get("n")})
    return f"n = {' or '.join(map(str, counts))}" if counts else "none yet"
