"""Finished results, one file for each row and seed, and their combination over the seeds."""

import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.quality.measure import Measured
from benchmarks.quality.reference import unfinished_name, write_tensors
from benchmarks.quality.rows import Row
from benchmarks.quality.task import Task, key_of
from tempoquant.checkpoint.files import sync
from tempoquant.evaluate.results import Summary
from tempoquant.plain_values import plain
from tempoquant.recipe import Recipe

MEASURES = ("bits_per_weight", "seconds", "cpu_seconds", "sqnr_db", "final_latent_db")
"""The fields of `Measured` that are kept as they are."""


class RowFiles:
    """The folder of finished results: KEY.json, and beside it KEY.safetensors with the final
    latents.
    """

    def __init__(self, folder: Path, task: Task) -> None:
        self._folder, self._task = folder, task
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, row: Row, seed: int) -> dict[str, Any] | None:
        """Return the result of this row and seed; None for none.

        A result is ignored if its recipe has a different meaning, because a default has changed
        since.
        """
        file = self._file(row, seed)
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found if _same_settings(found["recipe"], self._settings(row.recipe)) else None

    def save(self, row: Row, seed: int, measured: Measured) -> dict[str, Any]:
        """Store a result; the latents come before the file that names them."""
        file = self._file(row, seed)
        write_tensors(file.with_suffix(".safetensors"), {"final_latents": measured.final_latents})
        record = plain(
            {
                "recipe": self._settings(row.recipe),
                "eight_bit_timesteps": repr(row.eight_bit_timesteps),
                "seed": seed,
                "commit": commit(),
                "machine": machine(),
                **{key: getattr(measured, key) for key in MEASURES},
                "maps": {denoiser: found._asdict() for denoiser, found in measured.maps.items()},
            }
        )
        write_json(file, record)
        return record

    def final_latents(self, row: Row, seed: int) -> torch.Tensor:
        """Return (prompts, channels, frames, height, width) of a finished result."""
        return load_file(self._file(row, seed).with_suffix(".safetensors"))["final_latents"]

    def beside(self, row: Row, seed: int, ending: str) -> Path:
        """Return the place of a file for later findings about a result."""
        file = self._file(row, seed)
        return file.with_name(f"{file.stem}.{ending}")

    def _file(self, row: Row, seed: int) -> Path:
        return self._folder / f"{key_of(self._task, row.recipe, seed, row.eight_bit_timesteps)}.json"

    def _settings(self, recipe: Recipe | None) -> dict[str, Any]:
        return {} if recipe is None else self._task.resolve(recipe).to_dict()


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON file that is complete or absent."""
    unfinished = unfinished_name(file)
    unfinished.write_text(json.dumps(plain(record), allow_nan=False), encoding="utf-8")
    sync(unfinished)
    unfinished.replace(file)


def combine(row: Row, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine one row over its seeds, as plain values: means with standard errors over seeds ×
    prompts, and each seed's own.
    """
    first = records[0]
    return {
        **_name_of(row),
        "bits_per_weight": first["bits_per_weight"],
        "sqnr_db": {key: summary([r["sqnr_db"][key] for r in records]) for key in first["sqnr_db"]},
        "final_latent_db": summary([record["final_latent_db"] for record in records]),
        **{key: math.fsum(record[key] for record in records) / len(records) for key in ("seconds", "cpu_seconds")},
        "seeds": {str(record["seed"]): {key: record[key] for key in MEASURES} for record in records},
        "commits": sorted({record["commit"] for record in records}),
        "machines": sorted({record["machine"] for record in records}),
    }


def failed(row: Row, error: Exception) -> dict[str, Any]:
    """Make a row that could not be measured."""
    return {**_name_of(row), "error": str(error)}


def summary(values: Sequence[Sequence[float | str]]) -> dict[str, Any]:
    """Compute mean and standard error over all values of all seeds, (seeds, prompts); infinities
    may be texts.

    Every seed has the same prompts: the error shows how far other noise would move the mean, for
    these prompts only.
    """
    found = Summary.of([float(value) for of_seed in values for value in of_seed])
    return {"mean": found.mean, "standard_error": found.standard_error, "n": found.num_values}


def differences(results: Sequence[dict[str, Any]], base: Mapping[str, Any]) -> None:
    """Add to each result its paired difference to another one, over the seeds and prompts that both
    have.
    """
    for result in results:
        if "seeds" not in result:
            continue
        both = [seed for seed in result["seeds"] if seed in base["seeds"]]
        pairs = {
            key: [(result["seeds"][seed]["sqnr_db"][key], base["seeds"][seed]["sqnr_db"][key]) for seed in both]
            for key in ("high_noise", "low_noise")
        }
        pairs["final_latent"] = [
            (result["seeds"][seed]["final_latent_db"], base["seeds"][seed]["final_latent_db"]) for seed in both
        ]
        finite = all(math.isfinite(float(v)) for pair in pairs.values() for side in pair for vs in side for v in vs)
        if both and finite:
            result["difference_db"] = {
                key: summary([[float(a) - float(b) for a, b in zip(*pair, strict=True)] for pair in of_key])
                for key, of_key in pairs.items()
            }


def read_peers(file: Path) -> list[dict[str, Any]]:
    """Read rows that another program measured, one JSON object a line: the keys of `combine`, as
    far as they exist.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    return [{"group": "peer", "method": json.loads(line)["row"], **json.loads(line)} for line in lines if line.strip()]


def commit() -> str:
    """Return the commit of the working tree, with "+" if it has changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """Describe the computing machine."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _name_of(row: Row) -> dict[str, Any]:
    return {
        "row": row.label,
        "method": row.method,
        "group": row.group,
        "format": row.recipe and row.recipe.format,
        "rank": row.recipe and row.recipe.rank,
    }


def _same_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two recipes are the same except for their names; a key that one lacks has its
    default value.
    """
    defaults = Recipe(name="").to_dict()
    keys = (set(before) | set(now)) - {"name"}
    return all(before.get(key, defaults.get(key)) == now.get(key, defaults.get(key)) for key in keys)
