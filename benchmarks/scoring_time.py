"""Processor time of measuring one video against its reference, and of writing it: the CPU work of
`tempoquant evaluate` beside generating.

    python -m benchmarks.scoring_time                     # 480x832, 61 frames
    python -m benchmarks.scoring_time --size 720x1280 --frames 81 --json scoring.jsonl

The videos are a drifting pattern with noise, which compresses worse than most. Processor time
covers all threads and ffmpeg, so it tells how many cores a machine needs, and not the waiting time.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tempoquant
from benchmarks.json_line import publish
from benchmarks.scale import commit_name, describe_machine
from tempoquant.cli.options import parse_size
from tempoquant.evaluate.files import read_lossless, write_lossless, write_mp4
from tempoquant.evaluate.metrics.measures import Clip, measures
from tempoquant.evaluate.metrics.video_metrics import Video

NUM_BINS = 6
_NOISE = 4.0  # of 255


def drifting_pattern(height: int, width: int, num_frames: int, seed: int) -> Video:
    """Draw waves that move, and noise: (num_frames, height, width, 3), uint8."""
    noise = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    frames = []
    for frame in range(num_frames):
        waves = [np.sin((rows * (c + 1) + columns * 2 + 9 * frame) / 40) for c in range(3)]
        picture = 128 + 90 * np.stack(waves, -1) + noise.normal(0, _NOISE, (height, width, 3))
        frames.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(frames)


def scoring_row(height: int, width: int, num_frames: int) -> dict[str, Any]:
    """Measure processor seconds of writing a video, and of reading and measuring it; bytes of its
    files.
    """
    latents = {
        f"bin {index}": torch.ones(1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8)
        for index in range(NUM_BINS)
    }
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{name}.mkv" for name in ("reference", "other")]
        videos = [drifting_pattern(height, width, num_frames, seed) for seed in range(2)]
        write_lossless(files[0], videos[0], 16)
        mp4 = Path(scratch) / "other.mp4"
        write_s = _processor_seconds(lambda: (write_lossless(files[1], videos[1], 16), write_mp4(mp4, videos[1], 16)))

        def score() -> None:
            first, second = (Clip("", read_lossless(file), file, latents) for file in files)
            for measure in measures(False, height, width):
                measure.of(second, first)

        score_s = _processor_seconds(score)
        sizes = {
            "mp4_bytes": mp4.stat().st_size,
            "lossless_bytes": files[1].stat().st_size,
            "raw_bytes": videos[1].nbytes,
            "latents_bytes": sum(each.nbytes for each in latents.values()),
        }
    return {"height": height, "width": width, "num_frames": num_frames, "write_s": write_s, "score_s": score_s, **sizes}


def _processor_seconds(work: Any) -> float:
    before = _used()
    work()
    return _used() - before


def _used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)  # ffmpeg's, once it has ended
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=parse_size("480x832"))
    parser.add_argument("--frames", type=int, default=61)
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    arguments = parser.parse_args()
    row = scoring_row(arguments.size.height, arguments.size.width, arguments.frames)
    record = {
        "benchmark": "scoring_time",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "machine": describe_machine("cpu"),
        "row": row,
    }
    print(f"Processor seconds for each video: {row['write_s']:.1f} to write, {row['score_s']:.1f} to measure.")
    publish(record, arguments.json)


if __name__ == "__main__":
    main()
