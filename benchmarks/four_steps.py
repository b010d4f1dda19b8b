"""Four steps instead of twenty with guidance: whether the bundled model still follows its prompts,
and the time saved.

    # tiny in 16 bits, with and without its LoRAs
    python -m benchmarks.four_steps
    # and results of `tempoquant quantize --lora …`
    python -m benchmarks.four_steps --folder ours --folder rtn

Every model makes the video of a held-out task before the next task begins, in a rotating order, so
that other work on the machine affects all of them alike. The pixel checker judges the videos.
Prints a table and one JSON line; `n` is the number of tasks. Each task has its own seed, the same
for every model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import tempoquant
from benchmarks.json_line import publish
from benchmarks.scale import commit_name, describe_machine
from tempoquant.hosts.diffusers.pipeline import load_pipeline, open_pipeline
from tempoquant.models.lora.given import with_loras
from tempoquant.models.sampling_file import default_settings, settings_of
from tempoquant.tiny import LORA_NAME, evaluation_items
from tempoquant.tiny.sets import EVALUATION_SEED_BASE, TinyItem
from training.generate import summary

LORAS = {"high_noise": LORA_NAME, "low_noise": LORA_NAME}
FULL = "16-bit, all steps"


class Row(NamedTuple):
    """A way to make videos."""

    pipeline: Any
    num_steps: int
    guidance_scale: float


class Taken(NamedTuple):
    """Wall seconds of one video: all of it, and the calls of the denoisers in it."""

    whole: float
    denoising: float


def rows_of(folders: Sequence[Path], few: int) -> dict[str, Row]:
    """Return every row by its name: 16 bits as shipped, in few steps without LoRAs and with them,
    each folder with its own settings.
    """
    source = open_pipeline("tiny")
    own, distilled = default_settings(source), with_loras(source, LORAS)
    settings = settings_of(distilled, {})
    plain = load_pipeline(source, "cpu", torch.float32)
    rows = {
        FULL: Row(plain, own.num_steps, own.guidance_scale),
        f"16-bit, {few} steps, no LoRA": Row(plain, few, settings.guidance_scale),
        f"16-bit, {few} steps, with guidance, no LoRA": Row(plain, few, own.guidance_scale),
        f"16-bit, {settings.num_steps} steps": Row(
            load_pipeline(distilled, "cpu", torch.float32), settings.num_steps, settings.guidance_scale
        ),
    }
    for folder in folders:
        quantized = open_pipeline(folder)
        settings = default_settings(quantized)
        rows[f"{folder.name}, {settings.num_steps} steps"] = Row(
            load_pipeline(quantized, "cpu", torch.float32), settings.num_steps, settings.guidance_scale
        )
    return rows


def make(row: Row, item: TinyItem, seed: int) -> tuple[NDArray[np.float32], Taken]:
    """Make one video, (17, 64, 64, 3) in [0, 1], and return it with its times."""
    denoising = 0.0
    begun: list[float] = []

    def end(*_: Any) -> None:
        nonlocal denoising
        denoising += time.perf_counter() - begun.pop()

    models = (row.pipeline.transformer, row.pipeline.transformer_2)
    handles = [model.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())) for model in models]
    handles += [model.register_forward_hook(end) for model in models]
    start = time.perf_counter()
    video = row.pipeline(
        item.image,
        item.prompt,
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=row.num_steps,
        guidance_scale=row.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    taken = Taken(time.perf_counter() - start, denoising)
    for handle in handles:
        handle.remove()
    return video, taken


def measure(rows: Mapping[str, Row], items: Sequence[TinyItem]) -> dict[str, dict[str, Any]]:
    """Measure for every row the pixel checker's shares, median seconds, and the median speedup over
    tasks.
    """
    videos: dict[str, list[NDArray[np.float32]]] = {name: [] for name in rows}
    taken: dict[str, list[Taken]] = {name: [] for name in rows}
    names = list(rows)
    for index, item in enumerate(items):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            video, seconds = make(rows[name], item, EVALUATION_SEED_BASE + index)
            videos[name].append(video)
            taken[name].append(seconds)
    found = {}
    for name, row in rows.items():
        pairs = list(zip(taken[FULL], taken[name], strict=True))
        found[name] = {
            "num_steps": row.num_steps,
            "guidance_scale": row.guidance_scale,
            "n": len(items),
            **summary(np.stack(videos[name]), items),
            "seconds": statistics.median(each.whole for each in taken[name]),
            "seconds_denoising": statistics.median(each.denoising for each in taken[name]),
            "times_as_fast": statistics.median(full.whole / each.whole for full, each in pairs),
            "times_as_fast_denoising": statistics.median(full.denoising / each.denoising for full, each in pairs),
        }
    return found


def print_table(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table in Markdown."""
    print(
        "| run | videos followed | movers followed | appearance kept | PSNR to drawn (dB) | s a video "
        "| times as fast | denoising alone |\n|---|---|---|---|---|---|---|---|"
    )
    for name, row in found.items():
        shares = (row[f"{key}_fraction"] for key in ("motion_followed", "movers_followed", "appearance_kept"))
        cells = [
            *(f"{100 * share:.1f} %" for share in shares),
            f"{row['psnr_db']:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['times_as_fast']:.1f}",
            f"{row['times_as_fast_denoising']:.1f}",
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-items", type=int, default=64)
    parser.add_argument("--few", type=int, default=4, help="steps of the rows without LoRAs (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, action="append", default=[], help="a quantized pipeline, may be repeated"
    )
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    found = measure(rows_of(arguments.folder, arguments.few), evaluation_items(arguments.num_items))
    print_table(found)
    record = {
        "benchmark": "four_steps",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "machine": describe_machine("cpu"),
        "num_threads": arguments.num_threads,
        "rows": found,
    }
    publish(json.loads(json.dumps(record, default=str)), arguments.json)


if __name__ == "__main__":
    main()
