"""The bundled model `tiny`: Wan2.2-I2V's architecture at 1/3000 of its size, trained on a
procedural world.
"""

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
    "lora_file",
    "render",
    "sample_scene",
    "weights_folder",
]


def weights_folder() -> Path:
    """Return the folder of the bundled model, a complete pipeline for
    `WanImageToVideoPipeline.from_pretrained`.
    """
    return Path(__file__).parent / "weights"


LORA_NAME = "tiny-4steps"
"""The name of the bundled pair of LoRAs in place of a file; it states the number of steps they were
distilled for.
"""


def lora_file(expert: str) -> Path:
    """Return the LoRA that takes an expert of `tiny`, `high_noise` or `low_noise`, to four steps
    without guidance.
    """
    return Path(__file__).parent / "loras" / LORA_NAME / f"{expert}_model.safetensors"
