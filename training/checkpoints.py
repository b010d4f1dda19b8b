"""One training checkpoint is one safetensors file: model, running average, optimizer; written whole
or not at all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

RUNS = Path("runs")
"""Where every training run keeps its files; ignored by git."""
LOGS = Path(__file__).parent / "logs"
"""The logs of the run that made the shipped weights; kept in git."""


def append_log(name: str, row: Mapping[str, Any]) -> None:
    """Add one JSON line to runs/<name>.jsonl (and show it)."""
    RUNS.mkdir(exist_ok=True)
    line = json.dumps({**row, "unix_time": round(time.time())})
    print(line, flush=True)
    with (RUNS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def update_average(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """Update average ← decay·average + (1 − decay)·parameters, in place."""
    state = model.state_dict()
    keys = [key for key in average if state[key].is_floating_point()]
    torch._foreach_lerp_([average[key] for key in keys], [state[key] for key in keys], 1.0 - decay)


def save_checkpoint(
    path: Path, model: nn.Module, average: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write `path` atomically: a killed run leaves the old file or the new one."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"average.{key}": value for key, value in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(
        {key: value.detach().clone().contiguous() for key, value in tensors.items()}, unfinished, {"step": str(step)}
    )
    os.replace(unfinished, path)


def load_checkpoint(path: Path, model: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Restore all three in place; return the step to resume from, 0 without a checkpoint."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for key in average:
        average[key].copy_(tensors[f"average.{key}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def read_average(path: Path) -> dict[str, Tensor]:
    """Return only the running average, which ships."""
    with safe_open(path, "pt") as file:
        return {key.removeprefix("average."): file.get_tensor(key) for key in file.keys() if key.startswith("average.")}
