"""Held-out videos of the current expert checkpoints, judged by the pixel checker.

    python -m training.generate --num-items 16

For a look while the experts train: it reads the checkpoints in runs/, or --folder, a finished
pipeline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from numpy.typing import NDArray
from PIL import Image

from tempoquant.evaluate.metrics.prompt_adherence import check_prompt
from tempoquant.tiny.sets import EVALUATION_SEED_BASE, TinyItem, calibration_items
from tempoquant.tiny.world import render
from training.checkpoints import RUNS
from training.export import trained


def generate(
    pipeline: WanImageToVideoPipeline, items: Sequence[TinyItem], num_steps: int, guidance_scale: float
) -> NDArray[np.float32]:
    """Generate (items, 17, 64, 64, 3), values in [0, 1]; item i uses the seed EVALUATION_SEED_BASE
    + i.
    """
    videos = []
    for index, item in enumerate(items):
        video = pipeline(
            item.image,
            item.prompt,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(EVALUATION_SEED_BASE + index),
            output_type="np",
        ).frames[0]
        videos.append(video)
    return np.stack(videos)


def contact_sheet(videos: NDArray[np.float32], items: Sequence[TinyItem]) -> Image.Image:
    """Draw five frames of each drawn scene, and to its right the same frames of the generated
    video; one item a row.
    """
    picks = (0, 4, 8, 12, 16)
    rows = []
    for video, item in zip(videos, items, strict=True):
        drawn = render(item.scene)
        rows.append(np.concatenate([drawn[i] for i in picks] + [(video[i] * 255).astype(np.uint8) for i in picks], 1))
    return Image.fromarray(np.concatenate(rows, 0))


def summary(videos: NDArray[np.float32], items: Sequence[TinyItem]) -> dict[str, float]:
    """Compute shares of videos and of movers that pass, and the mean PSNR against the drawn
    scenes.
    """
    results = [check_prompt(video, item.prompt) for video, item in zip(videos, items, strict=True)]
    movers = [mover for result in results for mover in result.movers]
    drawn = np.stack([render(item.scene) for item in items]) / 255.0
    errors = ((videos - drawn) ** 2).mean(axis=(1, 2, 3, 4))
    return {
        "motion_followed_fraction": float(np.mean([result.motion_followed for result in results])),
        "appearance_kept_fraction": float(np.mean([result.appearance_kept for result in results])),
        "movers_followed_fraction": float(np.mean([mover.motion_followed for mover in movers])),
        "movers_kept_fraction": float(np.mean([mover.appearance_kept for mover in movers])),
        "psnr_db": float((-10.0 * np.log10(errors)).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-items", type=int, default=16)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=2.5)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="a pipeline folder; made of the newest checkpoints when left out")
    parser.add_argument("--sheet", type=Path, default=RUNS / "sheet.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    folder = arguments.folder or RUNS / "tiny-newest"
    if arguments.folder is None:
        trained(folder)
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    items = calibration_items(arguments.num_items)
    videos = generate(pipeline, items, arguments.num_steps, arguments.guidance_scale)
    contact_sheet(videos, items).save(arguments.sheet)
    settings = {"num_items": len(items), "num_steps": arguments.num_steps, "guidance_scale": arguments.guidance_scale}
    print(json.dumps({**settings, **{key: round(value, 4) for key, value in summary(videos, items).items()}}))


if __name__ == "__main__":
    main()
