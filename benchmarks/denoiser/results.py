"""Finished results, a file for each row and seed, and their combination over the seeds."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.denoiser.layers import kind_of
from benchmarks.denoiser.rows import RANK_SHARE, Row
from benchmarks.quality.results import commit, write_json


class RowFiles:
    """The folder of finished results.

    A result is valid for its row as long as recipe, bins, rank and sources are the same. Sources
    that differ from their commit are never the same.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._commit = folder, commit()

    def load(self, row: Row, seed: int, of_any_sources: bool = False) -> dict[str, Any] | None:
        """Return the result of this row and seed; None without a valid one."""
        file = self._file(row, seed)
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        same_sources = found["commit"] == self._commit and not self._commit.endswith("+")
        return found if found["settings"] == _settings(row) and (same_sources or of_any_sources) else None

    def save(self, row: Row, seed: int, measured: Mapping[str, Any]) -> None:
        """Store a result."""
        self._folder.mkdir(parents=True, exist_ok=True)
        record = {"settings": _settings(row), "seed": seed, "commit": self._commit, **measured}
        write_json(self._file(row, seed), record)

    def _file(self, row: Row, seed: int) -> Path:
        return self._folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', row.label)}-{seed}.json"


def combine(row: Row, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine one row over its seeds: errors as shares of the norm, each with its mean, its
    standard deviation and n.
    """
    layers = {
        name: statistics.fmean(error for record in records for error in record["layers"][name])
        for name in records[0]["layers"]
    }
    worst = max(layers, key=lambda name: layers[name])
    result: dict[str, Any] = {
        "row": row.label,
        "format": row.recipe.format,
        "num_bins": row.num_bins,
        "rank": _rank(row),
        "bits_per_weight": records[0]["bits_per_weight"],
        "seconds": statistics.fmean(record["seconds"] for record in records),
        "commits": sorted({record["commit"] for record in records}),
    }
    found = {what: [record[what] for record in records] for what in ("network", "denoised")}
    found["single_layer"] = [[statistics.fmean(at) for at in zip(*r["layers"].values(), strict=True)] for r in records]
    for what, errors in found.items():  # of each seed, at each sigma
        result[what] = summary([statistics.fmean(of_seed) for of_seed in errors])
        result[f"{what}_at_each_sigma"] = [summary(values) for values in zip(*errors, strict=True)]
    kinds = dict.fromkeys(map(kind_of, layers))
    result["kinds"] = {kind: summary([_mean_of_kind(record, kind) for record in records]) for kind in kinds}
    result["worst_layer"] = {"name": worst, "error": layers[worst]}
    return {**result, "layers": {name: float(f"{error:.4g}") for name, error in layers.items()}}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Compute mean, standard deviation over the seeds (None of one), and their number."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "n": len(values)}


def _mean_of_kind(record: Mapping[str, Any], kind: str) -> float:
    found = [error for name, errors in record["layers"].items() if kind_of(name) == kind for error in errors]
    return statistics.fmean(found)


def _settings(row: Row) -> dict[str, Any]:
    return {"recipe": row.recipe.to_dict(), "num_bins": row.num_bins, "rank": _rank(row)}


def _rank(row: Row) -> str | int:
    if row.recipe.rank == 0:
        return 0
    return f"{RANK_SHARE:.0%} of the width" if row.rank is None else row.rank
