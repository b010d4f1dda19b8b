"""A GPU's rates as `python -m benchmarks.gpu_first_day` measured them."""

import json
from pathlib import Path
from typing import Any

from tempoquant.errors import SettingsError
from tempoquant.planning.gpus import GPUS, Gpu, gpu_named, measured

_STEPS = ("versions", "peaks")


def measured_gpu(file: Path, gpu: Gpu | None = None) -> Gpu:
    """Return the GPU that a file of results is about, with the rates that were measured on it.

    Args:
        file: a JSON object a line.
        gpu: whose datasheet tells what was not measured; None for the one that the file names.

    Raises:
        SettingsError: the file does not hold what is needed, or its GPU is not in the table.
        OSError: it cannot be read.
    """
    found = _results(file)
    versions, peaks = (found.get(step, {}) for step in _STEPS)
    try:
        name = str(versions["gpu"])
        bytes_per_s, bf16 = float(peaks["bytes_per_s"]), float(peaks["bf16_flops"])
        fp8 = None if peaks["fp8_flops"] is None else float(peaks["fp8_flops"])
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            f"{file} holds no rates of a GPU ({error!r} of its steps versions and peaks): make it with "
            "`python -m benchmarks.gpu_first_day --json FILE` on a GPU."
        ) from error
    if not min(bytes_per_s, bf16, 1.0 if fp8 is None else fp8) > 0:
        raise SettingsError(f"{file} holds a rate that is not above 0: measure again.")
    return measured(gpu or _in_table(file, name), name, bytes_per_s, bf16, fp8)


def _in_table(file: Path, name: str) -> Gpu:
    try:
        return gpu_named(name)
    except SettingsError as error:
        raise SettingsError(
            f"{file} holds rates of {name!r}, whose datasheet is not known: say with --gpu which card stands for what "
            f"was not measured, one of {', '.join(GPUS)}, and with --gpu-gib the memory that yours has."
        ) from error


def _results(file: Path) -> dict[str, Any]:
    """Return step to result, of the steps that are needed; a line that was cut off is none."""
    found = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and record.get("step") in _STEPS and isinstance(record.get("result"), dict):
            found[record["step"]] = record["result"]
    return found
