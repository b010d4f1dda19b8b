"""The bundled model `tiny`: Wan2.2-I2V's architecture at 1/3000 of its size, really trained on a procedural world."""

from __future__ import annotations

from pathlib import Path

from tempoquant.tiny.sets import TinyItem, calibration_items, evaluation_items
from tempoquant.tiny.world import Mover, Scene, describe, render, sample_scene

__all__ = [
    "Mover",
    "Scene",
    "TinyItem",
    "calibration_items",
    "describe",
    "evaluation_items",
    "render",
    "sample_scene",
    "weights_folder",
]


def weights_folder() -> Path:
    """The folder of the bundled model, a complete pipeline for `WanImageToVideoPipeline.from_pretrained`."""
    return Path(__file__).parent / "weights"
