"""Memory and time of quantizing one denoiser of published shapes, by number of blocks and of
tokens.

    python -m benchmarks.scale                       # 2 and 6 blocks, 4 samples of 4,096 tokens
    # one block, and one with a sample of 32,760 tokens
    python -m benchmarks.scale --blocks 1 --long
    python -m benchmarks.scale --model ltx-2 --recipe default --blocks 1 --samples 2 --tokens 6144
    # a double block and a single one
    python -m benchmarks.scale --model flux.1-dev --blocks 1 --samples 2 --tokens 1024
    python -m benchmarks.scale --device cuda --json scale.jsonl

The denoiser is random (benchmarks/scale_model.py), with Wan2.2-I2V-A14B's shapes by default. The
recipe is the paper's, or that of `--recipe`. Each row runs in its own process. Memory must follow
the size of one block, not their number.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import tempoquant
from benchmarks.json_line import publish
from benchmarks.scale_model import write_denoiser, write_samples
from benchmarks.scale_shapes import SHAPES, Shapes
from tempoquant.cli.progress import duration_text
from tempoquant.device import compute_dtype
from tempoquant.planning.run_estimate import measure_gemm_rate

LONG_TOKENS = 32_760  # of 81 frames of 480 × 832
TARGET_GIB = 10.0
LONG_TARGET_GIB = 14.0
MAX_SPREAD = 0.03  # between the rows that differ in their number of blocks
PUBLISHED = (
    "For comparison: the published code holds 56 to 68 GB of float32 Hessians of a denoiser on the CPU, and both "
    "bfloat16 denoisers on an 80 GB GPU. It samples three trajectories for each prompt."
)


class RowSize(NamedTuple):
    """The size of one row."""

    blocks: int
    samples: int
    tokens: int


def run_row(work: Path, size: RowSize, device: str, recipe: str, model: str) -> dict[str, Any]:
    """Write the denoiser, quantize it in another process, remove it; return that process's
    measurements, or its error.
    """
    folder = work / f"{size.blocks}-blocks-{size.tokens}-tokens"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write_denoiser(folder, size.blocks, SHAPES[model])
        write_samples(folder / "store", size.samples, size.tokens, SHAPES[model])
        command = [
            sys.executable,
            "-m",
            "benchmarks.scale_row",
            str(folder),
            "--device",
            device,
            "--recipe",
            recipe,
            "--model",
            model,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        return {**size._asdict(), "error": f"ended with code {done.returncode}"}
    return {**size._asdict(), **summary(json.loads(done.stdout.splitlines()[-1]), SHAPES[model])}


def summary(found: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Add each stage's time over the blocks (spread: largest less smallest), that of a block of
    each list, and that of a whole denoiser.
    """
    stages = {
        stage: _mean_and_spread([block.get(stage, 0.0) for block in found["each_block_s"]])
        for stage in dict.fromkeys(stage for block in found["each_block_s"] for stage in block)
    }
    all_s = [sum(block.values()) for block in found["each_block_s"]]
    each = len(all_s) // len(shapes.lists)
    by_list = {
        name: _mean_and_spread(all_s[number * each : (number + 1) * each]) for number, name in enumerate(shapes.lists)
    }
    blocks_s = sum(depth * by_list[name]["mean"] for name, depth in shapes.lists.items())
    return {
        **found,
        "stages_s": stages,
        "block_s": _mean_and_spread(all_s),
        "lists_s": by_list,
        "expert_s": found["start_s"] + blocks_s + found["end_s"],
    }


def _mean_and_spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "spread": max(values) - min(values)}


def verdicts(rows: list[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is met, a sentence) for every target that the rows concern."""
    for row in rows:
        target_gib = LONG_TARGET_GIB if row["tokens"] >= LONG_TOKENS else TARGET_GIB
        what = f"{row['blocks']} blocks, {row['samples']} × {row['tokens']} tokens"
        if "error" in row:
            yield False, f"{what}: {row['error']}"
        else:
            peak_gib = row["peak_rss_gib"]
            yield peak_gib <= target_gib, f"{what}: peak RSS {peak_gib:.2f} GiB; the target is at most {target_gib:g}"
    by_size: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if "error" not in row:
            by_size.setdefault((row["samples"], row["tokens"]), []).append(row["peak_rss_gib"])
    for peaks in by_size.values():
        if len(peaks) > 1:
            spread = max(peaks) / min(peaks) - 1
            yield spread <= MAX_SPREAD, f"peaks differ by {spread:.1%}; the target is at most {MAX_SPREAD:.0%}"


def print_table(rows: list[dict[str, Any]], machine: Mapping[str, Any], shapes: Shapes, recipe: str) -> None:
    """Print a column a row, with the published code's needs below."""
    title = (
        f"One denoiser of {shapes.title}'s shapes, recipe {recipe}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['ram_gib']:.0f} GiB, {machine['gemm_gflops']:.0f} GFLOP/s"
    )
    table = Table(
        title=title,
        title_justify="left",
        caption=PUBLISHED if shapes.family.name == "wan" else None,
        caption_justify="left",
    )
    table.add_column("")
    measured = [row for row in rows if "error" not in row]
    for row in measured:
        table.add_column(f"{row['blocks']} blocks\n{row['samples']} × {row['tokens']:,} tokens", justify="right")
    table.add_row("peak RSS, GiB", *(f"{row['peak_rss_gib']:.2f}" for row in measured))
    if any(row["peak_vram_gib"] for row in measured):
        table.add_row("peak VRAM, GiB", *(f"{row['peak_vram_gib']:.2f}" for row in measured))
    for stage in dict.fromkeys(stage for row in measured for stage in row["stages_s"]):
        table.add_row(f"{stage}, s a block", *(_text(row["stages_s"].get(stage)) for row in measured))
    for name in shapes.lists:
        what = f"a block of {name}" if len(shapes.lists) > 1 else "a block"
        table.add_row(f"{what}, s", *(_text(row["lists_s"][name]) for row in measured))
    table.add_row("start, s", *(f"{row['start_s']:.1f}" for row in measured))
    table.add_row(
        f"denoiser of {sum(shapes.lists.values())} blocks", *(duration_text(row["expert_s"]) for row in measured)
    )
    Console(width=140).print(table)
    for is_met, sentence in verdicts(rows):
        print("pass:" if is_met else "MISS:", sentence)


def _text(seconds: Mapping[str, float] | None) -> str:
    return "–" if seconds is None else f"{seconds['mean']:.1f} ± {seconds['spread'] / 2:.1f}"


def describe_machine(device: str) -> dict[str, Any]:
    """Describe the machine that the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "ram_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gemm_gflops": measure_gemm_rate(device, compute_dtype(device)) / 1e9,
    }


def commit_name() -> str:
    """Return the short hash of the sources, and whether files under git differ from it."""
    describe = ["git", "describe", "--always", "--exclude", "*", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--long", action="store_true", help=f"add one block with one sample of {LONG_TOKENS} tokens")
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--model", choices=SHAPES, default="wan2.2-i2v-a14b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="folder for the denoisers (9 GB for 6 blocks)")
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    arguments = parser.parse_args()
    sizes = [RowSize(blocks, arguments.samples, arguments.tokens) for blocks in arguments.blocks]
    sizes += [RowSize(1, 1, LONG_TOKENS)] if arguments.long else []
    machine = describe_machine(arguments.device)
    with tempfile.TemporaryDirectory(prefix="scale-", dir=arguments.work) as work:
        rows = []
        for size in sizes:
            rows.append(run_row(Path(work), size, arguments.device, arguments.recipe, arguments.model))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # hours of work may follow, and fail
    record = {
        "benchmark": "scale",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "model": arguments.model,
        "recipe": arguments.recipe,
        "device": arguments.device,
        "machine": machine,
        "rows": rows,
        "verdicts": [{"met": is_met, "what": what} for is_met, what in verdicts(rows)],
    }
    print_table(rows, machine, SHAPES[arguments.model], arguments.recipe)
    publish(record, arguments.json)


if __name__ == "__main__":
    main()
