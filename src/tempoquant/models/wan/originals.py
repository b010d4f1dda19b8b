"""Wan's original releases: their repositories, those of the same models in diffusers' layout, and
their folders.
"""

import json
from pathlib import Path

from tempoquant.models.wan.pipelines import COMPONENTS

_LIKE = "Wan-AI/"
DIFFUSERS_IDS = {
    f"{_LIKE}{name}": f"{_LIKE}{name}{suffix}"
    for suffix, names in {
        "-Diffusers": (
            "Wan2.2-I2V-A14B",
            "Wan2.2-T2V-A14B",
            "Wan2.2-TI2V-5B",
            "Wan2.2-Animate-14B",
            "Wan2.1-T2V-1.3B",
            "Wan2.1-T2V-14B",
            "Wan2.1-I2V-14B-480P",
            "Wan2.1-I2V-14B-720P",
        ),
        "-diffusers": ("Wan2.1-VACE-1.3B", "Wan2.1-VACE-14B", "Wan2.1-FLF2V-14B-720P"),
    }.items()
    for name in names
}
"""Hub ids of diffusers pipelines by those of original releases."""


def original_parts(folder: Path) -> dict[str, Path]:
    """Return a release's folders of weights by denoiser; none for a folder that is no release of
    Wan.
    """
    experts = {name: folder / f"{name}_model" for name in COMPONENTS}
    if all(path.is_dir() for path in experts.values()):
        return experts
    return {next(iter(COMPONENTS.values())): folder} if _is_original(folder / "config.json") else {}


def _is_original(config: Path) -> bool:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and str(values.get("_class_name")).endswith(("WanModel", "WanAnimateModel"))
