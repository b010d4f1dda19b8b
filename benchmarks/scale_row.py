"""One row of `benchmarks.scale`, in its own process, so that its peak memory is its own.

    python -m benchmarks.scale_row FOLDER --device cpu

The folder holds the denoiser and its samples. Prints one JSON line.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.scale_model import source_of
from benchmarks.scale_shapes import SHAPES, Shapes
from tempoquant.calibrate.sequential import QuantizedBlock
from tempoquant.cli.json_log import JsonLog
from tempoquant.progress import SILENT, Progress
from tempoquant.quantizing.component import ComponentJob, quantize_component
from tempoquant.quantizing.machine import Machine
from tempoquant.recipe import Recipe

GIB = 2**30


class _Starts:
    """A progress that records when its latest task began: the blocks', once embeddings are done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.latest = 0.0

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task; see `Progress.start`."""
        self.latest = time.perf_counter()
        return self._progress.start(description, total, done)


def quantize_row(folder: Path, recipe: Recipe, device: str, shapes: Shapes) -> dict[str, Any]:
    """Quantize the denoiser in `folder` with the samples in its `store` as a run does: commit each
    block, then the next.

    Returns:
        Seconds of the start, of each block by stage, of the end, and of all.
    """
    target = folder / "quantized"
    job = ComponentJob(
        source_of(folder, shapes),
        shapes.denoiser.name,
        recipe,
        folder / "store",
        lora=None,
        work=folder,
        target=target,
        device=device,
    )
    blocks: list[dict[str, float]] = []
    began = time.perf_counter()
    safe_at: list[float] = []
    with JsonLog(SILENT, folder / "progress.jsonl") as log:
        starts = _Starts(log)

        def on_block(block: QuantizedBlock) -> None:
            now = time.perf_counter()
            before = safe_at[-1] if safe_at else starts.latest
            blocks.append({**block.seconds, "store": now - before - sum(block.seconds.values())})
            safe_at.append(now)
            log.note(f"block {block.index} is safe")

        quantize_component(job, Machine((device,)), starts, on_block)
    ended = time.perf_counter()
    num_bytes = sum(file.stat().st_size for file in target.iterdir())
    return {
        "start_s": starts.latest - began,
        "each_block_s": blocks,
        "end_s": ended - safe_at[-1],
        "total_s": ended - began,
        "output_gib": num_bytes / GIB,
    }


def peak_memory(device: str) -> dict[str, float | None]:
    """Return the peak RSS of this process in GiB by both counts that Linux keeps, and the GPU's
    peak of allocated memory.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts KiB on Linux
    peak_gib: float | None = None
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines() if ":" in line)
        peak_gib = int(fields["VmHWM"].split()[0]) * 1024 / GIB
    on_gpu = torch.device(device).type == "cuda"
    return {
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB,
        "peak_vmhwm_gib": peak_gib,
        "peak_vram_gib": torch.cuda.max_memory_allocated(device) / GIB if on_gpu else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--model", choices=SHAPES, default="wan2.2-i2v-a14b")
    arguments = parser.parse_args()
    seconds = quantize_row(arguments.folder, Recipe.load(arguments.recipe), arguments.device, SHAPES[arguments.model])
    print(json.dumps({**seconds, **peak_memory(arguments.device)}))


if __name__ == "__main__":
    main()
