"""The environment of a result: versions, the commit of a source checkout, processor and GPUs, the
date.
"""

import datetime
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return plain values; "commit" is None for an installed package."""
    return {
        "tempoquant": version("tempoquant"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "platform": platform.platform(),
        "cpu": device_name(torch.device("cpu")),
        "devices": [device_name(torch.device("cuda", index)) for index in range(torch.cuda.device_count())],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()


def _commit() -> str | None:
    """Return the commit of the checkout that this package is imported from; "… (modified)" with
    uncommitted changes.
    """
    folder = Path(__file__).parent.parent
    if not (folder.parent.parent / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (" (modified)" if status.stdout.strip() else "")


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
