"""VBench's own temporal flickering beside ours: on the same lossless frames, and through the H.264
of our videos.

    python -m benchmarks.vbench_flickering .venv-vbench/bin/python [--clips 6]

VBench decodes the files itself, in its own environment. On lossless frames (FFV1) both must agree
to TOLERANCE, or the exit status is 1. The effect of H.264 is measured, since VBench scores a
model's mp4 files and we score its frames.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tempoquant
from benchmarks.json_line import publish
from benchmarks.scale import commit_name, describe_machine
from tempoquant.cli.progress import RichProgress
from tempoquant.evaluate.files import write_lossless, write_mp4
from tempoquant.evaluate.metrics.video_metrics import Video, temporal_flickering
from tempoquant.evaluate.vbench.scores import answers_of
from tempoquant.evaluate.vbench.settings import VBench, VBenchSettings, check_vbench
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.quiet import quiet_libraries
from tempoquant.hosts.diffusers.sampling import generate_video
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.progress import Progress
from tempoquant.recording.prompt_sets import evaluation_prompts

DIMENSION = "temporal_flickering"
TOLERANCE = 1e-6
"""VBench subtracts and averages in float32, 2⁻²⁴ of at most 255 a step; ours is exact until the
last division.
"""
FRAMES_PER_SECOND = 8


class Row(NamedTuple):
    """One clip's scores: ours, and VBench's of the lossless and of the H.264 file."""

    clip: str
    ours: float
    lossless: float
    h264: float


def generated_clips(num_clips: int, progress: Progress) -> dict[str, Video]:
    """Generate clips of the bundled model, from held-out prompts."""
    source = SourceModel.open("tiny")
    pipeline, settings = load_pipeline(source, "cpu"), default_settings(source)
    prompts = evaluation_prompts("tiny", None, num_clips)
    on_clip, clips = progress.start("Generating", num_clips), {}
    for prompt in prompts:
        clips[prompt.id] = generate_video(pipeline, prompt, settings, 0)
        on_clip()
    return clips


def made_clips() -> dict[str, Video]:
    """Make two clips without a model: uniform noise, which H.264 preserves least, and a still
    gradient.
    """
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    shades = np.linspace(0, 255, 64, dtype=np.uint8)
    still = np.broadcast_to(shades[None, None, :, None], (17, 64, 64, 3)).copy()
    return {"uniform noise": noise, "still gradient": still}


def compare(vbench: VBench, clips: Mapping[str, Video]) -> list[Row]:
    """Score every clip three times. Raises RuntimeError if VBench fails."""
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for number, clip in enumerate(clips.values()):
            for suffix, write in ((".mkv", write_lossless), (".mp4", write_mp4)):
                files.append(Path(scratch) / f"{number}{suffix}")
                write(files[-1], clip, FRAMES_PER_SECOND)
        videos = [{"video": str(file), "image": "", "prompt": ""} for file in files]
        answers = list(answers_of(vbench, DIMENSION, videos, Path(scratch) / "log.txt"))
    if failed := [answer["why"] for answer in answers if "score" not in answer]:
        raise RuntimeError(f"VBench failed: {failed[0]}")
    scores = [answer["score"] for answer in answers]
    return [
        Row(name, float(temporal_flickering(clip) or 0), lossless, h264)
        for (name, clip), lossless, h264 in zip(clips.items(), scores[::2], scores[1::2], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="interpreter of VBench's environment")
    parser.add_argument("--clips", type=int, default=6, help="number of clips of the bundled model")
    arguments = parser.parse_args()
    quiet_libraries()
    with RichProgress() as progress:
        vbench = check_vbench(VBenchSettings(arguments.python, (DIMENSION,)), "cpu")
        rows = compare(vbench, {**generated_clips(arguments.clips, progress), **made_clips()})
    print(f"VBench {vbench.versions['vbench']}, {DIMENSION}")
    print(f"{'clip':<24}{'ours, frames':>14}{'VBench − ours':>16}{'VBench of mp4':>16}{'mp4 − frames':>16}")
    for row in rows:
        apart, gap = row.lossless - row.ours, row.h264 - row.ours
        print(f"{row.clip:<24}{row.ours:>14.6f}{apart:>+16.1e}{row.h264:>16.6f}{gap:>+16.6f}")
    worst = max(abs(row.lossless - row.ours) for row in rows)
    print(f"largest difference on the same frames: {worst:.1e} (allowed: {TOLERANCE:.0e})")
    publish(
        {
            "benchmark": "vbench_flickering",
            "version": tempoquant.__version__,
            "commit": commit_name(),
            "vbench": vbench.versions,
            "machine": describe_machine("cpu"),
            "results": [row._asdict() for row in rows],
        }
    )
    sys.exit(0 if worst <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
