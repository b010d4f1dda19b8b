"""The loss of ComfyUI's own 4-bit formats on a bundled model: our export beside our runtime and
round to nearest.

    # twenty minutes on two cores; needs comfy-kitchen
    python -m benchmarks.comfyui --json runs/comfyui.jsonl

Every row has the same calibration samples, and is judged on the same calls of held-out 16-bit
generations: SQNR of the noise prediction by denoiser, and the median over layers of the output's
SQNR, each layer on the 16-bit model's input.
"""

import argparse
import contextlib
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from benchmarks.comfyui.linears import (
    ComfyUILinear,
    Compute,
    convrot_w4a4,
    exported_nvfp4,
    nearest_nvfp4,
    svdquant_w4a4,
)
from benchmarks.json_line import publish
from benchmarks.quality.measure import QuantizedDenoiser, dequantizing_once, installed, quantize
from benchmarks.quality.reference import Reference, prepare
from benchmarks.quality.task import Task
from tempoquant.calibrate.capture import watching_inputs
from tempoquant.checkpoint.tensors import entry_of
from tempoquant.cli.progress import RichProgress
from tempoquant.evaluate.noise_prediction import call_errors
from tempoquant.hosts.comfyui.nvfp4_layout import num_replacing_bytes
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import predict_noise
from tempoquant.models.denoiser_inputs import on_device
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.progress import Progress
from tempoquant.recipe import Recipe
from tempoquant.recording.prompt_sets import calibration_prompts, evaluation_prompts
from tempoquant.sqnr import sqnr_db

Layers = Mapping[str, QuantizedDenoiser]
"""The quantized layers by denoiser."""
CONVROT_GROUPS = (16, 64, 256)


class Row(NamedTuple):
    """One computation. `make` gets a denoiser, a layer's name and its 16-bit linear; None runs our
    own runtime.
    """

    label: str
    bits_per_weight: float
    layers: Layers
    make: Callable[[str, str, nn.Linear], Compute] | None


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.comfyui", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-outliers", help="a bundled model (default: %(default)s)")
    parser.add_argument(
        "--rank", type=int, default=2, help="rank of every branch (default: %(default)s, the share that 32 is of 5120)"
    )
    parser.add_argument("--prompts", type=int, default=4, help="number of held-out prompts (default: %(default)s)")
    parser.add_argument("--every", type=int, default=4, help="measure one of every EVERY calls (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=40, help="calibration samples of each denoiser (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results to this file")
    arguments = parser.parse_args()
    progress = RichProgress()
    task = task_of(arguments.model, arguments.prompts, arguments.samples)
    pipeline = load_pipeline(task.source, "cpu")
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        reference = prepare(task, arguments.seed, pipeline, Path(work), progress)
        rows = make_rows(task, reference, arguments.rank, progress)
        advance = progress.start("Judging", len(rows))
        results = []
        for row in rows:
            results.append(judge(pipeline, reference, row, arguments.every))
            advance()
    Console().print(table_of(results))
    given = {key: value for key, value in vars(arguments).items() if key != "json"}
    publish({"benchmark": "comfyui", **given, "rows": results}, arguments.json)


def task_of(model: str, num_prompts: int, num_samples: int) -> Task:
    """Return the task that judges all rows. Raises TempoQuantError."""
    source = SourceModel.open(model)
    settings = default_settings(source)
    calibration = calibration_prompts(model, None, Recipe(name="").num_prompts)
    held_out = evaluation_prompts(model, None, num_prompts)
    return Task(source, fingerprint(source), settings, calibration, held_out, num_samples)


def make_rows(task: Task, reference: Reference, rank: int, progress: Progress) -> list[Row]:
    """Quantize by each recipe once, and list the ways to compute."""

    def by(recipe: str) -> Layers:
        resolved = task.resolve(Recipe.load(recipe).replace(rank=rank))
        return {name: quantize(task, reference, resolved, name, progress) for name in COMPONENTS}

    ours, nunchaku, int4, default = map(by, ("comfyui_nvfp4", "nunchaku_nvfp4", "nunchaku_int4", "default"))
    bits, nunchaku_bits = exported_bits(ours), exported_bits(nunchaku)

    def exported(layers: Layers, four_bits: bool, with_branch: bool = True) -> Callable[..., Compute]:
        return lambda denoiser, name, _: exported_nvfp4(layers[denoiser].layers[name], four_bits, with_branch)

    return [
        Row("default, our runtime, W4A4", stored_bits(default), default, None),
        Row("comfyui_nvfp4, our runtime, W4A4", stored_bits(ours), ours, None),
        Row("comfyui_nvfp4, exported, W4A4", bits, ours, exported(ours, True)),
        Row("comfyui_nvfp4, exported, W4A16", bits, ours, exported(ours, False)),
        Row("nunchaku_nvfp4, exported, W4A4", nunchaku_bits, nunchaku, exported(nunchaku, True)),
        Row("nunchaku_nvfp4, exported, W4A16", nunchaku_bits, nunchaku, exported(nunchaku, False)),
        Row("comfyui_nvfp4, exported, branch left out, W4A16", bits, ours, exported(ours, False, False)),
        Row("round to nearest, nvfp4, W4A4", 4.5, ours, lambda _d, _n, linear: nearest_nvfp4(linear.weight, True)),
        Row("round to nearest, nvfp4, W4A16", 4.5, ours, lambda _d, _n, linear: nearest_nvfp4(linear.weight, False)),
        *(
            Row(f"convrot_w4a4, groups of {size}", row_scaled_bits(ours), ours, _convrot(size))
            for size in CONVROT_GROUPS
        ),
        Row(
            "nunchaku_int4 in svdquant_w4a4",
            stored_bits(int4),
            int4,
            lambda denoiser, name, _: svdquant_w4a4(int4[denoiser].layers[name]),
        ),
    ]


def _convrot(size: int) -> Callable[[str, str, nn.Linear], Compute]:
    return lambda _denoiser, _name, linear: convrot_w4a4(linear.weight, size)


def row_scaled_bits(layers: Layers) -> float:
    """Count the bits a weight with four for each and one float32 a row."""
    shapes = [(each.out_features, each.in_features) for one in layers.values() for each in one.layers.values()]
    return 4 + 32 * sum(rows for rows, _ in shapes) / sum(rows * columns for rows, columns in shapes)


def exported_bits(layers: Layers) -> float:
    """Count the bits a weight of both files."""
    found = [layer for each in layers.values() for layer in each.layers.values()]
    num_weights = sum(layer.in_features * layer.out_features for layer in found)
    return 8 * sum(num_replacing_bytes(entry_of(layer)) for layer in found) / num_weights


def stored_bits(layers: Layers) -> float:
    """Count the bits a weight of our checkpoint."""
    return sum(each.num_bits for each in layers.values()) / sum(each.num_weights for each in layers.values())


@contextlib.contextmanager
def computing(pipeline: Any, row: Row) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Make the pipeline compute as a row does within this context. Yields the 16-bit and the other
    denoiser of each.
    """
    if row.make is None:
        with installed(pipeline, row.layers) as pairs, dequantizing_once(row.layers):
            yield pairs
        return
    pairs = {}
    try:
        for denoiser, component in COMPONENTS.items():
            original = getattr(pipeline, component)
            other = copy.deepcopy(original, {id(parameter): parameter for parameter in original.parameters()})
            for name in row.layers[denoiser].layers:
                linear = original.get_submodule(name)
                other.set_submodule(name, ComfyUILinear(row.make(denoiser, name, linear), linear.bias))
            pairs[denoiser] = (original, other)
            setattr(pipeline, component, other)
        yield pairs
    finally:
        for denoiser, (original, _) in pairs.items():
            setattr(pipeline, COMPONENTS[denoiser], original)


def judge(pipeline: Any, reference: Reference, row: Row, every: int) -> dict[str, Any]:
    """Measure SQNR of the noise prediction by denoiser (mean over prompts), and of the layers'
    outputs (median over layers).
    """
    by_denoiser: dict[str, list[float]] = {name: [] for name in COMPONENTS}
    with computing(pipeline, row) as pairs:
        layers: list[float] = []
        for trajectory in reference.trajectories():
            calls = trajectory.calls[::every]
            layers = layers or layer_errors(reference, pairs, calls, row)
            errors = call_errors(lambda sample: predict_noise(pipeline, sample), calls)
            for name, values in by_denoiser.items():
                values.append(statistics.fmean(error.sqnr_db for error in errors if error.denoiser == name))
    means = {name: statistics.fmean(values) for name, values in by_denoiser.items()}
    spread = {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in by_denoiser.items()}
    return {
        "row": row.label,
        "bits_per_weight": row.bits_per_weight,
        "sqnr_db": means,
        "standard_deviation_db": spread,
        "median_layer_sqnr_db": statistics.median(layers),
        "worst_layer_sqnr_db": min(layers),
    }


def layer_errors(reference: Reference, pairs: Mapping[str, tuple[Any, Any]], calls: list[Any], row: Row) -> list[float]:
    """Measure SQNR of each layer's output on one call's inputs of the 16-bit model, a conditional
    call in mid-trajectory.
    """
    found: list[float] = []
    for denoiser, (original, other) in pairs.items():
        samples = [c.sample for c in calls if c.sample.denoiser == denoiser]
        sample = samples[len(samples) // 2]
        linears = {name: original.get_submodule(name) for name in row.layers[denoiser].layers}

        def observe(name: str, x: torch.Tensor, linears: Any = linears, other: Any = other, t: Any = sample) -> None:
            wanted = functional.linear(x, linears[name].weight, linears[name].bias)
            layer = other.get_submodule(name)
            place = layer.at_timestep(t.timestep) if hasattr(layer, "at_timestep") else contextlib.nullcontext()
            with place:
                found.append(sqnr_db(wanted, layer(x)))

        with watching_inputs(linears, observe):
            original(**on_device(original, reference.task.source.family, sample.inputs), return_dict=False)
    return found


def table_of(results: list[dict[str, Any]]) -> Table:
    """Make a table with a row for each computation."""
    table = Table("", "bits", *(f"{name}, dB" for name in COMPONENTS), "layers, median dB", "worst")
    for result in results:
        cells = [f"{result['sqnr_db'][name]:.2f} ± {result['standard_deviation_db'][name]:.2f}" for name in COMPONENTS]
        layers = (f"{result[f'{which}_layer_sqnr_db']:.1f}" for which in ("median", "worst"))
        table.add_row(result["row"], f"{result['bits_per_weight']:.2f}", *cells, *layers)
    return table


if __name__ == "__main__":
    main()
