"""A finished evaluation of two models, without a model: what VBench is given."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from tempoquant.evaluate.benchmark_sets import Item
from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.files import write_mp4

LABELS = ("16-bit", "rtn")
NUM_FRAMES, SIDE = 5, 32


def plan_of(texts: dict[str, str]) -> SimpleNamespace:
    """Return the part of a plan that scoring uses: the takes of a label, one seed for each item."""
    items = [Item(id, text, Image.new("RGB", (SIDE, SIDE)), "hash") for id, text in texts.items()]
    return SimpleNamespace(items=items, takes=lambda label: [(item, Take(label, item.id, 0)) for item in items])


def write_takes(path: Path, ids: list[str], video_of=None) -> EvaluationFolder:
    """Write every item with every label, generated and finished; `video_of` gives the frames of a
    take.
    """
    folder = EvaluationFolder(path)
    path.mkdir(parents=True)
    for label in LABELS:
        for number, id in enumerate(ids):
            take = Take(label, id, 0)
            for kind in ("videos", "lossless"):
                folder.place(kind, take).parent.mkdir(parents=True, exist_ok=True)
            if video_of is None:
                folder.place("videos", take).write_bytes(bytes(100 * (number + 1) - (20 if label == "rtn" else 0)))
            else:
                write_mp4(folder.place("videos", take), video_of(take), 8)
            folder.place("lossless", take).write_bytes(b"not read")
            folder.finish(take, {"low_noise bin 0": torch.ones(2)}, {"seconds_per_step": None})
    return folder


def noise(take: Take, share: float = 0.1) -> np.ndarray:
    """Return a grey video with its own noise."""
    generator = np.random.default_rng([len(take.label), sum(take.id.encode())])
    frames = 128 + 255 * share * generator.standard_normal((NUM_FRAMES, SIDE, SIDE, 3))
    return frames.clip(0, 255).astype(np.uint8)
