"""The stages of reproducing the published evaluation on one machine: hours, GPU memory, disk. The
project's own estimators compute them from the model's shapes; nothing is measured.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from benchmarks.evaluation_operations import SHARE, VideoCost, video_cost
from benchmarks.hollow_pipeline import write_hollow_pipeline
from benchmarks.kernels_roofline import H100_SXM, Rates
from tempoquant.models.pipeline_configs import read_configs
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.models.wan.pipelines import I2V_A14B
from tempoquant.models.wan.published import A14B
from tempoquant.placement.modes import MEMORY_MODES, WHILE_RECORDING
from tempoquant.planning.memory_plan import MemoryPlan, ModelPlan, plan_memory
from tempoquant.planning.run_estimate import GIB, RunEstimate, estimate
from tempoquant.quantizing.machine import Machine
from tempoquant.recipe import Recipe
from tempoquant.recording.plan import default_samples_per_denoiser

PUBLISHED = I2V_A14B.replace(num_frames=61)
NUM_CALIBRATION_PROMPTS = 12
RECIPES = ("paper", "default")
PRODUCT_SHARE = 0.7
"""The share of a datasheet's BF16 rate that large matrix products reach, given to the estimate of
quantizing as this GPU's rate. An assumption; that estimate's shares of it for each kind of work are
the project's own.
"""

LOAD_BYTES_PER_S = 7e8  # reading weights from files and casting them, as planning/run_estimate.py takes for a block
LATENT_BINS = 6
_LATENT_CHANNELS, _FLOAT = 16, 4
MP4_SHARE = 0.1  # of the raw frames, at the most: assumed


@dataclass(frozen=True)
class Evaluated:
    """The generated videos: every item with every seed by every model, the 16-bit one among
    them.
    """

    num_items: int
    num_seeds: int = 1
    size: SamplingSettings = PUBLISHED

    @property
    def takes(self) -> int:
        """Return the number of videos of one model."""
        return self.num_items * self.num_seeds


@dataclass(frozen=True)
class Stage:
    """One command, or one model's part of it.

    Attributes:
        name: of the work.
        hours: by memory mode.
        gpu_gib: peak by memory mode, torch's allocations; empty if the CPU works.
        ram_gib: peak by memory mode, as far as predicted.
        disk_gib: its files on the disk at the end.
        passing_gib: its further files while it runs.
    """

    name: str
    hours: Mapping[str, float]
    gpu_gib: Mapping[str, float] = field(default_factory=dict)
    ram_gib: Mapping[str, float] = field(default_factory=dict)
    disk_gib: float = 0.0
    passing_gib: float = 0.0


def take_bytes(size: SamplingSettings) -> dict[str, int]:
    """Bound the bytes of one take's files in an evaluation's folder, by kind."""
    raw = 3 * size.num_frames * size.height * size.width
    latents = ((size.num_frames - 1) // 4 + 1) * (size.height // 8) * (size.width // 8)
    return {
        "latents": LATENT_BINS * _LATENT_CHANNELS * latents * _FLOAT,
        "lossless": raw,
        "videos": round(MP4_SHARE * raw),
    }


def resolved(name: str, size: SamplingSettings) -> Recipe:
    """Return a recipe with every setting that `estimate` needs."""
    return Recipe.load(name).replace(
        height=size.height,
        width=size.width,
        num_frames=size.num_frames,
        num_steps=size.num_steps,
        flow_shift=size.flow_shift,
        guidance_scale=size.guidance_scale,
        num_prompts=NUM_CALIBRATION_PROMPTS,
        samples_per_denoiser=default_samples_per_denoiser(size, read_configs(A14B).geometry),
    )


def run_estimate(
    source: SourceModel, recipe: Recipe, rates: Rates, records: bool, memory: str = "resident"
) -> RunEstimate:
    """Estimate `quantize`, and `record` before it if requested, on one GPU."""
    return estimate(
        source,
        recipe,
        devices=["cuda"],
        num_samples=dict.fromkeys(COMPONENTS, recipe.samples_per_denoiser or 0),
        records=records,
        link=True,
        hidden_ram_bytes=Machine(("cuda",)).hidden_ram_bytes,
        memory=memory,
        gemm_rates={"cuda": PRODUCT_SHARE * rates.bf16_flops},
    )


def stages(what: Evaluated, score_s: float, rates: Rates = H100_SXM, share: float = SHARE) -> list[Stage]:
    """Return all stages in order.

    Args:
        score_s: processor seconds of measuring a video (benchmarks/scoring_time.py).
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = SourceModel.open(write_hollow_pipeline(Path(scratch) / "model"))
        return [
            _recording(source, what.size, rates),
            *(_quantizing(source, name, what.size, rates) for name in RECIPES),
            *_generating(what, video_cost(what.size, rates, share)),
            Stage("measure, one core", dict.fromkeys(MEMORY_MODES, len(RECIPES) * what.takes * score_s / 3600)),
        ]


@cache
def model_gib() -> float:
    """Return the size of the 16-bit pipeline's weight files on the hub."""
    with tempfile.TemporaryDirectory() as scratch:
        files = write_hollow_pipeline(Path(scratch) / "model").rglob("*.safetensors")
        return sum(file.stat().st_size for file in files) / GIB


def _recording(source: SourceModel, size: SamplingSettings, rates: Rates) -> Stage:
    found = {
        m: run_estimate(source, resolved("paper", size), rates, True, WHILE_RECORDING[m]).stages[0]
        for m in MEMORY_MODES
    }
    return Stage(
        "record",
        {mode: (stage.seconds or 0.0) / 3600 for mode, stage in found.items()},
        {mode: stage.peak_gpu_gib for mode, stage in found.items()},
        {mode: stage.peak_memory_gib for mode, stage in found.items()},
        found["resident"].disk_gib,
    )


def _quantizing(source: SourceModel, name: str, size: SamplingSettings, rates: Rates) -> Stage:
    found = run_estimate(source, resolved(name, size), rates, records=False)
    left = found.stages[-1].disk_gib
    everywhere = dict.fromkeys(MEMORY_MODES, (found.total_seconds or 0.0) / 3600)
    gpu = dict.fromkeys(MEMORY_MODES, max(stage.peak_gpu_gib for stage in found.stages))
    ram = dict.fromkeys(MEMORY_MODES, found.peak_memory_gib)
    return Stage(f"quantize `{name}`", everywhere, gpu, ram, left, found.peak_disk_gib - left)


@cache
def memory_plans(size: SamplingSettings) -> Mapping[str, MemoryPlan]:
    """Return the predictions of `tempoquant plan`, by recipe."""
    return {name: plan_memory(read_configs(A14B), size, Recipe.load(name)) for name in RECIPES}


def _generating(what: Evaluated, cost: VideoCost) -> Iterator[Stage]:
    plans = memory_plans(what.size)
    models: dict[str, ModelPlan] = {"16-bit": next(iter(plans.values())).sixteen_bit}
    models |= {f"`{name}`": plan.quantized for name, plan in plans.items()}
    disk = what.takes * sum(take_bytes(what.size).values()) / GIB
    for name, model in models.items():
        seconds = cost.seconds_16bit if name == "16-bit" else cost.seconds_4bit
        yield Stage(
            f"generate, {name}",
            dict.fromkeys(MEMORY_MODES, what.takes * seconds / 3600),
            {mode.mode: mode.peak / GIB for mode in model.modes},
            {mode.mode: mode.host / GIB for mode in model.modes},
            disk,
        )
