"""Peak GPU memory of a generation by phase and memory mode, beside the prediction of `tempoquant
plan`.

    # Wan2.2-I2V-A14B's shapes, 480x832, 81 frames
    python -m benchmarks.memory
    python -m benchmarks.memory --size 720x1280 --modes swap lean
    python -m benchmarks.memory --json memory.jsonl

On an NVIDIA GPU it runs two steps, one of each denoiser, with guidance, on random weights made
there, in 16 bits and quantized, and compares the peak of active memory with the prediction: within
10 %. Active memory is allocated, or waits for another stream before it can be reused; the peak of
reserved memory is given beside it. Both 16-bit denoisers stay on the GPU in "resident", which takes
80 GB; 128 GiB of RAM hold all modes. Without a GPU it prints the prediction alone.
"""

import argparse
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import tempoquant
from benchmarks.json_line import publish
from benchmarks.memory_model import TEXT, entering_phases, random_pipeline
from benchmarks.scale import commit_name, describe_machine
from tempoquant.cli.memory_table import Machine, memory_record, memory_tables
from tempoquant.cli.options import parse_size
from tempoquant.models.pipeline_configs import PipelineConfigs, read_configs
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.wan.pipelines import HIGH_NOISE
from tempoquant.models.wan.published import A14B
from tempoquant.placement.memory_modes import set_memory_mode
from tempoquant.placement.modes import WITH_WEIGHTS
from tempoquant.planning.generation_memory import Kernels, QuantizedLayers, foreseen_layers
from tempoquant.planning.memory_plan import BOUNDARY, MemoryPlan, ModePlan, denoising_name, plan_memory
from tempoquant.recipe import Recipe

TOLERANCE = 0.10
NUM_STEPS = 2


class DevicePeaks:
    """The peaks of CUDA's allocator by phase, allocated or held for another stream, and of reserved
    memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.by_phase: dict[str, int] = {}
        self.reserved = 0
        self._device, self._phase = device, ""

    def enter(self, phase: str) -> None:
        """End the phase before, and begin this one; "" ends the last one."""
        torch.cuda.synchronize(self._device)
        if self._phase:
            stats = torch.cuda.memory_stats(self._device)
            found = stats["active_bytes.all.peak"]
            self.reserved = max(self.reserved, stats["reserved_bytes.all.peak"])
            self.by_phase[self._phase] = max(found, self.by_phase.get(self._phase, 0))
        torch.cuda.reset_peak_memory_stats(self._device)
        self._phase = phase


def measured(pipeline: Any, mode: str, size: SamplingSettings, device: torch.device) -> tuple[dict[str, int], int]:
    """Measure bytes by phase in the second of two generations, which finds what the first one left;
    and bytes reserved in all.
    """
    in_force = set_memory_mode(pipeline, mode, device)
    peaks = DevicePeaks(device)
    image = Image.new("RGB", (size.width, size.height))
    for _ in range(2):
        peaks.by_phase.clear()
        with entering_phases(pipeline, peaks.enter):
            pipeline(
                image,
                TEXT,
                negative_prompt="",
                height=size.height,
                width=size.width,
                num_frames=size.num_frames,
                num_inference_steps=NUM_STEPS,
                guidance_scale=2.0,
                output_type="pt",
            )
            peaks.enter("")
    in_force.remove()
    pipeline.transformer.to("cpu")
    pipeline.transformer_2.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    return peaks.by_phase, peaks.reserved


def predicted(mode: ModePlan) -> dict[str, int]:
    """Predict bytes by phase. Denoisers change places within the last high-noise call, so the two
    are one here.
    """
    peaks = {phase.name: phase.peak for phase in mode.phases}
    high = denoising_name(HIGH_NOISE)
    peaks[high] = max(peaks[high], peaks.pop(BOUNDARY))
    return peaks


def rows_of(
    configs: PipelineConfigs, plan: MemoryPlan, recipe: Recipe, modes: list[str], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield a row for each phase, mode and model: measured and predicted bytes."""
    layers: dict[str, QuantizedLayers | None] = {
        denoiser.name: foreseen_layers(configs, denoiser.name, recipe) for denoiser in configs.denoisers
    }
    for model, of_each in ((plan.quantized, layers), (plan.sixteen_bit, dict.fromkeys(layers))):
        pipeline = random_pipeline(configs, of_each, device)
        pipeline.set_progress_bar_config(disable=True)
        for mode in (mode for mode in model.modes if mode.mode in modes):
            found, reserved = measured(pipeline, mode.mode, plan.size, device)
            for phase, expected in predicted(mode).items():
                yield {
                    "model": model.label,
                    "mode": mode.mode,
                    "phase": phase,
                    "measured_bytes": found[phase],
                    "predicted_bytes": expected,
                    "ratio": found[phase] / expected,
                    "reserved_bytes_of_mode": reserved,
                }
        del pipeline
        gc.collect()


def verdicts(rows: list[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is met, a sentence) for the peak of each mode and model."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["mode"]), []).append(row)
    for (model, mode), phases in groups.items():
        found, expected = (max(row[key] for row in phases) for key in ("measured_bytes", "predicted_bytes"))
        off = found / expected - 1
        yield abs(off) <= TOLERANCE, f"{model}, {mode}: {found / 2**30:.2f} GiB measured, {off:+.1%} off the prediction"


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Print a line for each row, in GiB."""
    table = Table(title=title, title_justify="left")
    for heading in ("model", "mode", "phase"):
        table.add_column(heading)
    for heading in ("measured, GiB", "predicted, GiB", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [f"{row[key] / 2**30:.2f}" for key in ("measured_bytes", "predicted_bytes")]
        table.add_row(row["model"], row["mode"], row["phase"], *numbers, f"{row['ratio']:.3f}")
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=A14B, help="model whose shapes are used, as for tempoquant plan")
    parser.add_argument("--size", type=parse_size, default=parse_size("480x832"))
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--modes", nargs="+", choices=WITH_WEIGHTS, default=list(WITH_WEIGHTS))
    parser.add_argument("--recipe", default="default")
    parser.add_argument(
        "--kernels",
        choices=get_args(Kernels),
        default="fp8",
        help="kernels of 4-bit linears that the prediction assumes",
    )
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    arguments = parser.parse_args()
    configs, recipe = read_configs(arguments.model), Recipe.load(arguments.recipe)
    size = configs.family.published(configs.index)[1].replace(
        height=arguments.size.height, width=arguments.size.width, num_frames=arguments.frames
    )
    plan = plan_memory(configs, size, recipe, arguments.kernels)
    record = {
        "benchmark": "memory",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "kernels": arguments.kernels,
        "plan": memory_record(plan, Machine()),
    }
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        machine = describe_machine(str(device))
        rows = list(rows_of(configs, plan, recipe, arguments.modes, device))
        print_rows(rows, f"{plan.model}, {size.height}×{size.width}, {size.num_frames} frames, {machine['gpu']}")
        for is_met, sentence in verdicts(rows):
            print("pass:" if is_met else "MISS:", sentence)
        record |= {
            "kind": "measured",
            "machine": machine,
            "rows": rows,
            "verdicts": [{"met": is_met, "what": what} for is_met, what in verdicts(rows)],
        }
    else:
        record |= {"kind": "predicted"}
        for part in memory_tables(plan, Machine()):
            Console(width=140).print(part)
        print("There is no GPU, so nothing was measured.")
    publish(record, arguments.json)


if __name__ == "__main__":
    main()
