"""Scoring of the peers' outputs as rows: SQNR of the noise prediction and of the final latents,
against 16 bits.

python -m benchmarks.peers.score WORK
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks.peers.rows import ROWS, Row
from tempoquant.errors import ModelError
from tempoquant.evaluate.noise_prediction import CallError, summarize
from tempoquant.evaluate.results import Summary
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.sqnr import sqnr_db


def score_all(work: Path, rows: tuple[Row, ...] = ROWS) -> list[dict[str, Any]]:
    """Return the finished rows, in the order of `rows`; failed ones have an `error` and no SQNR."""
    return [score_row(work, row) for row in rows if (work / "out" / row.name / "row.json").is_file()]


def score_row(work: Path, row: Row) -> dict[str, Any]:
    """Return one row.json with its SQNR: per denoiser, each held-out prompt counted once; and of
    the final latents.

    Raises:
        ModelError: a prediction or a latent is missing, of another shape, or not finite.
    """
    folder = work / "out" / row.name
    record = {"name": row.name, **json.loads((folder / "row.json").read_text(encoding="utf-8"))}
    if "error" not in record:
        record["sqnr_db"] = {
            **{result.denoiser: _plain(result.sqnr_db) for result in summarize(_call_errors(work, folder))},
            "final_latent": _plain(Summary.of(_latent_sqnrs(work, folder))),
        }
    return record


def _call_errors(work: Path, folder: Path) -> list[CallError]:
    prompt_ids: Mapping[str, list[str]] = json.loads((work / "job.json").read_text(encoding="utf-8"))["held_out"]
    errors = []
    for denoiser in COMPONENTS:
        for index, prompt_id in enumerate(prompt_ids[denoiser]):
            name = f"{index:04}.safetensors"
            call = load_file(work / "held_out" / denoiser / name)
            prediction = _tensor(folder / "predictions" / denoiser / name, "noise_prediction")
            value = sqnr_db(call["noise_prediction"], prediction)
            errors.append(CallError(prompt_id, denoiser, float(call["timestep"].flatten()[0]), value))
    return errors


def _latent_sqnrs(work: Path, folder: Path) -> list[float]:
    files = sorted((work / "generations").glob("*.safetensors"))
    return [
        sqnr_db(_tensor(file, "final_latent"), _tensor(folder / "latents" / file.name, "final_latent"))
        for file in files
    ]


def _tensor(file: Path, key: str) -> torch.Tensor:
    if not file.is_file():
        raise ModelError(f"{file} is missing: make the row again.")
    return load_file(file)[key]


def _plain(summary: Summary) -> dict[str, Any]:
    return {"mean": summary.mean, "standard_error": summary.standard_error, "n": summary.num_values}


def print_table(results: list[dict[str, Any]], title: str) -> None:
    """Print a table, and below it the notes of each row."""
    columns = [*(denoiser for denoiser in COMPONENTS), "final_latent"]
    table = Table(title=title)
    for heading in ("", "format", "rank", "bits", *columns, "s"):
        table.add_column(heading, justify="left" if heading in ("", "format") else "right")
    notes = []
    for result in results:
        rank = "" if result.get("rank") is None else str(result["rank"])
        if "error" in result:
            table.add_row(result["row"], result["format"], rank, "", "did not run", "", "", "")
        else:
            cells = [f"{c['mean']:.2f} ± {c['standard_error'] or 0:.2f}" for c in map(result["sqnr_db"].get, columns)]
            bits, seconds = f"{result['bits_per_weight']:.2f}", f"{result['seconds']:.0f}"
            table.add_row(result["row"], result["format"], rank, bits, *cells, seconds)
        if note := result.get("error") or result.get("note"):
            notes.append(f"{result['name']}: {note}")
    console = Console(width=180)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    work = parser.parse_args().work
    results = score_all(work)
    print_table(results, f"{work}: SQNR, dB (higher is better)")
    print(json.dumps({"benchmark": "peers", "results": results}))


if __name__ == "__main__":
    main()
