"""Times of the linears of a Wan2.2 block on the GPU at hand, ours by stages, beside BF16 and other
people's.

    # 480 × 832 and 720 × 1280, 81 frames
    python -m benchmarks.kernels
    python -m benchmarks.kernels --tokens 32760 --json kernels.jsonl

Nothing is timed before its results have been compared with the reference. The machine code is
counted first for an expectation (`python -m benchmarks.machine_code`); without an NVIDIA GPU that
is all, for Hopper.
"""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import tempoquant
from benchmarks.json_line import publish
from benchmarks.kernels_roofline import Rates
from benchmarks.kernels_tables import block_table, measured_table
from benchmarks.machine_code.gpus import GPUS
from benchmarks.registry import BLOCK_LINEARS, VIDEO_TOKENS, Shape, inputs_of_block, shapes_of_block

Rows = list[dict[str, Any]]


def block_totals(video_tokens: int, rows_by_shape: Mapping[Shape, Rows]) -> dict[str, dict[str, float]]:
    """Return the milliseconds of the ten linears by method, for methods that ran in every shape.

    A method with separate stages quantizes a shared input once.
    """
    by_method: dict[str, dict[Shape, dict[str, Any]]] = {}
    for shape, rows in rows_by_shape.items():
        for row in rows:
            if "note" not in row:
                by_method.setdefault(row["method"], {})[shape] = row
    totals: dict[str, float] = {}
    for method, rows in by_method.items():
        if len(rows) == len(rows_by_shape):
            repeated = [linear.shape(video_tokens) for linear in BLOCK_LINEARS]
            for shape in inputs_of_block(video_tokens).values():
                repeated.remove(shape)
            whole = sum(rows[linear.shape(video_tokens)]["whole_ms"] for linear in BLOCK_LINEARS)
            spared = sum(rows[shape].get("quantize_ms", 0.0) + rows[shape].get("project_ms", 0.0) for shape in repeated)
            totals[method] = whole - spared
    baseline = next(iter(totals.values()), float("nan"))  # the 16-bit product is the first row of every shape
    return {method: {"ms": total, "ratio_to_bf16": baseline / total} for method, total in totals.items()}


def measure(video_tokens: Sequence[int], device: torch.device, graph: bool, console: Console) -> dict[str, Any]:
    """Measure everything, and print it as it comes."""
    from benchmarks.kernels_timing import measure_peaks, rows_of_shape

    peaks = measure_peaks(device)
    rates = Rates("this GPU, measured", peaks["bytes_per_s"], peaks["bf16_flops"], peaks["fp8_flops"] or float("nan"))
    console.print(
        f"Measured here: a copy {rates.bytes_per_s / 1e12:.2f} TB/s, BF16 {rates.bf16_flops / 1e12:.0f} TFLOP/s, "
        f"FP8 {rates.fp8_flops / 1e12:.0f} TFLOP/s."
    )
    results, by_shape = [], {}
    for tokens in video_tokens:
        for shape, names in shapes_of_block(tokens).items():
            if shape not in by_shape:
                by_shape[shape] = list(rows_of_shape(shape, peaks, device, graph))
                console.print(measured_table(f"{shape}: {', '.join(names)}", by_shape[shape]))
        rows_by_shape = {shape: by_shape[shape] for shape in shapes_of_block(tokens)}
        totals = block_totals(tokens, rows_by_shape)
        console.print(block_table(f"A block of {tokens:,} tokens", totals))
        rows = [
            {"shape": list(shape), "linears": shapes_of_block(tokens)[shape], "rows": rows}
            for shape, rows in rows_by_shape.items()
        ]
        results.append({"tokens": tokens, "shapes": rows, "block": totals})
    return {"peaks": peaks, "results": results}


def capability_here() -> int:
    """Return the compute capability to count for, 90 for 9.0: the newest known that is not newer
    than the GPU; or Hopper's.
    """
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return max((known for known in GPUS if known <= 10 * major + minor), default=min(GPUS))


def counted_tables(capability: int) -> str:
    """Return the output of benchmarks.machine_code, run in its own process, since Triton may be
    interpreting here.

    Raises CalledProcessError if a kernel does not compile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.machine_code", "--capability", str(capability)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def describe() -> dict[str, Any]:
    """Describe the environment that the figures depend on."""
    from benchmarks.scale import commit_name

    versions = {"tempoquant": tempoquant.__version__, "torch": torch.__version__, "python": platform.python_version()}
    record: dict[str, Any] = {"benchmark": "kernels", "commit": commit_name(), "versions": versions}
    if torch.cuda.is_available():
        import triton

        versions |= {"triton": triton.__version__, "cuda": torch.version.cuda or "none"}
        record |= {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    return record


def has_wrong_rows(measured: Mapping[str, Any]) -> bool:
    """Return whether a method gave wrong results anywhere."""
    shapes = [shape for result in measured["results"] for shape in result["shapes"]]
    return any(row.get("note", "").startswith("WRONG") for shape in shapes for row in shape["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(VIDEO_TOKENS.values()), help="of the video")
    parser.add_argument(
        "--graph", action="store_true", help="time inside CUDA graphs, which leaves out the cost of launching"
    )
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    arguments = parser.parse_args()
    console = Console(width=150)
    print(counted_tables(capability_here()), flush=True)
    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU, so nothing was measured: the tables above are counted and computed.")
        return 0
    with torch.no_grad():
        record = describe() | measure(arguments.tokens, torch.device("cuda"), arguments.graph, console)
    publish(record, arguments.json)
    return 1 if has_wrong_rows(record) else 0


if __name__ == "__main__":
    sys.exit(main())
