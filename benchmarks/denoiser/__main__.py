"""Recipes on a real network that changes along its denoising trajectory, as a whole and layer by
layer.

    # fetches the network (38 MB, a PyPI wheel) and runs it
    make bench-denoiser
    python -m benchmarks.denoiser WHEEL              # every row, three seeds; a stopped run resumes
    python -m benchmarks.denoiser WHEEL --rows 'ours*' --seeds 1
    python -m benchmarks.denoiser WHEEL --report --figure error.png

The network is the consistency-distilled U-Net of adaptive-terrain-diffusion (10.5 million
parameters, sigma 0.002 to 80): no transformer, but real, and up to thirty times as loud at low
noise as at high noise. The quantized layers are skip connections, attention's linears, those that
read the embedding, and, as matrices of patches, the 3×3 convolutions of 64 outputs or more: 94 % of
the weights. The rest, which makes the embedding or is narrow, stays in full precision.

Errors are norm over norm, on inputs of the full-precision network, with fields and noise that
calibration never saw; a seed changes them all. They are the U-Net's own: at sigma 0.002 the
denoised field does not depend on it at all. The network magnifies differences in the last bit: one
recipe, summed in another order, has errors some points apart. Single layers distinguish recipes
more sharply.
"""

import argparse
import importlib.util
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import tempoquant
from benchmarks.denoiser.layers import quantized_layers
from benchmarks.denoiser.measure import measure
from benchmarks.denoiser.results import RowFiles, combine
from benchmarks.denoiser.rows import FIGURE, Row, all_rows, select
from benchmarks.denoiser.samples import SIGMAS, take
from benchmarks.denoiser.table import PANELS, draw_error_against_sigma, kind_table, sigma_table
from benchmarks.denoiser.unet import Denoiser, hold_to_onnx_runtime, load, onnx_file
from benchmarks.json_line import publish
from benchmarks.quality.results import commit
from benchmarks.scale import describe_machine
from tempoquant.errors import TempoQuantError

FIELDS = {"calibration": 3, "held out": 1}  # at each noise level
TOKENS = {"calibration": 192, "held out": 64}  # of each layer at each noise level


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.denoiser", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("wheel", type=Path, help="adaptive_terrain_diffusion-0.4.1-py3-none-any.whl, from PyPI")
    add("--rows", nargs="+", metavar="GLOB", help="labels; default: all")
    add("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    add("--work", type=Path, default=Path("runs/denoiser"), help="folder of finished rows (default: %(default)s)")
    add("--again", action="store_true", help="measure the chosen rows again, even if they are finished")
    add("--report", action="store_true", help="measure nothing, and show the finished rows of any version")
    add("--figure", type=Path, metavar="FILE", help=f"draw error against sigma of {'; '.join(FIGURE)}")
    add("--json", type=Path, metavar="FILE", help="append the JSON line to a file as well")
    return parser.parse_args(words)


def check(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Raise TempoQuantError for everything that would fail after minutes of work."""
    if arguments.seeds < 1:
        raise TempoQuantError(f"at least one seed is needed, not {arguments.seeds}.")
    if not arguments.report and not zipfile.is_zipfile(arguments.wheel):
        raise TempoQuantError(f"{arguments.wheel} is not a wheel: `make bench-denoiser` fetches it from PyPI.")
    needed = [] if arguments.report else ["onnx", "onnxruntime"]
    for module in [*needed, *(["matplotlib"] if arguments.figure else [])]:
        if importlib.util.find_spec(module) is None:
            raise TempoQuantError(f"{module} is not installed: pip install 'tempoquant[bench]'.")
    for file in (arguments.figure, arguments.json):
        if file is not None and not file.parent.is_dir():
            raise TempoQuantError(f"{file} cannot be written: there is no folder {file.parent}.")
    if arguments.figure and not any(row.label in FIGURE for row in rows):
        raise TempoQuantError(f"--figure shows {'; '.join(FIGURE)}: none of them is among the rows.")


def measure_rows(rows: Sequence[Row], files: RowFiles, arguments: argparse.Namespace, console: Console) -> None:
    """Measure unfinished rows, seed by seed: rows of one seed are judged on the same samples."""
    denoiser: Denoiser | None = None
    for seed in range(arguments.seeds):
        missing = [row for row in rows if arguments.again or files.load(row, seed) is None]
        if not missing:
            continue
        if denoiser is None:
            denoiser = load_checked(arguments.wheel, console)
        calibration, held_out = (
            take(denoiser, FIELDS[part], TOKENS[part], 2 * seed + number) for number, part in enumerate(FIELDS)
        )
        for row in missing:
            measured = measure(row, denoiser, calibration, held_out)
            files.save(row, seed, measured)
            console.print(f"seed {seed}, {row.label}: {measured['seconds']:.0f} s")


def collect(rows: Sequence[Row], files: RowFiles, num_seeds: int) -> list[dict[str, Any]]:
    """Return the finished rows, each over the seeds it has."""
    every = [(row, [files.load(row, seed, of_any_sources=True) for seed in range(num_seeds)]) for row in rows]
    finished = [(row, [record for record in records if record is not None]) for row, records in every]
    return [combine(row, records) for row, records in finished if records]


def load_checked(wheel: Path, console: Console) -> Denoiser:
    """Load the network in PyTorch. Raises ModelError unless it agrees with ONNX Runtime."""
    model = onnx_file(wheel)
    denoiser = load(model)
    difference = hold_to_onnx_runtime(denoiser, model, SIGMAS)
    layers = [layer for _, layer in quantized_layers(denoiser)]
    num, share = sum(layer.weight.numel() for layer in layers), sum(p.numel() for p in denoiser.parameters())
    console.print(
        f"{len(layers)} layers with {num / 1e6:.1f} of {share / 1e6:.1f} million parameters are quantized; the network "
        f"differs from ONNX Runtime by {difference:.1g} at most."
    )
    return denoiser


def main(words: Sequence[str] | None = None) -> None:
    """Measure and report."""
    arguments, progress = parse(words), Console(stderr=True, soft_wrap=True)
    try:
        rows = select(all_rows(), arguments.rows)
        check(rows, arguments)
        files = RowFiles(arguments.work / "results")
        if not arguments.report:
            measure_rows(rows, files, arguments, progress)
        results = collect(rows, files, arguments.seeds)
        if not results:
            raise TempoQuantError(f"{arguments.work} has no finished row yet: run it without --report.")
        if arguments.figure:
            draw_error_against_sigma([result for result in results if result["row"] in FIGURE], arguments.figure)
    except TempoQuantError as error:
        sys.exit(str(error))
    console = Console(width=180)
    console.print(*(sigma_table(results, what) for what in PANELS), kind_table(results))
    record = {
        "benchmark": "denoiser",
        "model": arguments.wheel.name,
        "sigmas": SIGMAS,
        "fields": FIELDS,
        "tokens": TOKENS,
        "version": tempoquant.__version__,
        "commit": commit(),
        "machine": describe_machine("cpu"),
        "results": results,
    }
    publish(record, arguments.json)


if __name__ == "__main__":
    main()
