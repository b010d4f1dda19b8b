"""Calibration and evaluation sets of the bundled world: deterministic, and disjoint from training
by their seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from tempoquant.tiny.world import Scene, describe, render, sample_scene

TRAINING_SEED_BASE = 0
CALIBRATION_SEED_BASE = 10_000_000
EVALUATION_SEED_BASE = 20_000_000
"""Item i of a set is the scene drawn with seed base + i; a set holds fewer than ten million
items.
"""


@dataclass(frozen=True)
class TinyItem:
    """One task for the model: a first frame (64×64 RGB), a prompt, and the scene of a perfect
    answer.
    """

    id: str
    image: Image.Image
    prompt: str
    scene: Scene


def scene_from_seed(seed: int) -> Scene:
    """Return the scene of a seed, the same everywhere in this project."""
    return sample_scene(np.random.default_rng(seed))


def calibration_items(num_items: int) -> list[TinyItem]:
    """Return the first `num_items` calibration items, `tiny-calibration-0000` onwards."""
    return _items("calibration", CALIBRATION_SEED_BASE, num_items)


def evaluation_items(num_items: int) -> list[TinyItem]:
    """Return the first `num_items` held-out items, `tiny-evaluation-0000` onwards."""
    return _items("evaluation", EVALUATION_SEED_BASE, num_items)


def item_of(scene: Scene, item_id: str) -> TinyItem:
    """Return the item whose image is the scene's first frame and whose prompt describes it."""
    return TinyItem(item_id, Image.fromarray(render(scene, num_frames=1)[0]), describe(scene), scene)


def _items(name: str, seed_base: int, num_items: int) -> list[TinyItem]:
    if not 0 <= num_items < 10_000_000:
        raise ValueError(f"num_items is {num_items}; a set holds 0 to 9,999,999 items")
    return [item_of(scene_from_seed(seed_base + i), f"tiny-{name}-{i:04d}") for i in range(num_items)]
