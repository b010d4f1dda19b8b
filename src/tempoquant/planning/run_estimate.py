"""The predicted memory, disk and time of a run: from headers, recipe and settings alone, before any
work.
"""

import itertools
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tempoquant.calibrate.token_chunks import DEFAULT_TOKENS
from tempoquant.errors import OutputError
from tempoquant.models.component_files import Component
from tempoquant.models.sampling_file import default_settings, published_settings
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.planning.block_costs import DenoiserCosts
from tempoquant.recipe import Recipe

GIB = 2**30

_QUANTIZE, MEASURE = "quantize ", "measure sensitivity of "

_LIBRARIES_GIB = 0.9  # of memory, once PyTorch and diffusers are imported and have computed something
_COPY_BYTES_PER_S = 3e8  # reading, writing and hashing
_READ_BYTES_PER_S = 7e8  # a 16-bit block from its files, cast

# The share of the GEMM rate that each kind of work reaches. The CPU's were measured on one core of
# an AMD EPYC (0.97, 0.93, 0.56 and 0.87 in processor time); the GPU's are not measured: float32
# work gets no tensor cores there.
_FORWARD_SHARE = {"cpu": 0.9, "cuda": 0.6}
_STATISTICS_SHARE = {"cpu": 0.85, "cuda": 0.05}
_SOLVING_SHARE = {"cpu": 0.5, "cuda": 0.03}
_SEARCHING_SHARE = {"cpu": 0.8, "cuda": 0.05}
_COLUMN_S = {"cpu": 0.0, "cuda": 1e-4}  # launching the kernels of one GPTQ column


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a run.

    Attributes:
        name: "record", "quantize high_noise", "quantize low_noise" or "write".
        seconds: estimated; None if no GEMM rate is known.
        peak_memory_gib: RAM of the process at its peak.
        peak_gpu_gib: memory of the GPU at its peak; 0 if the CPU computes.
        disk_gib: all files of the run while the stage is at its peak, earlier stages' included.
    """

    name: str
    seconds: float | None
    peak_memory_gib: float
    peak_gpu_gib: float
    disk_gib: float


@dataclass(frozen=True)
class RunEstimate:
    """The stages of a run, in order.

    Attributes:
        side_by_side: whether all denoisers are measured, and quantized, at the same time, each on
            its own device.
    """

    stages: tuple[StageEstimate, ...]
    side_by_side: bool

    @property
    def peak_disk_gib(self) -> float:
        """Return the most that the run has on the disk at any time."""
        return max(stage.disk_gib for stage in self.stages)

    @property
    def peak_memory_gib(self) -> float:
        """Return the most RAM that the run needs at any time, over all its processes."""
        return max(sum(stage.peak_memory_gib for stage in together) for together in self._at_once())

    @property
    def total_seconds(self) -> float | None:
        """Estimate the time of the run; None if a stage's time is unknown."""
        if any(stage.seconds is None for stage in self.stages):
            return None
        return sum(max(stage.seconds or 0.0 for stage in together) for together in self._at_once())

    def _at_once(self) -> list[list[StageEstimate]]:
        """Return the stages, grouped by those that run at the same time."""
        if not self.side_by_side:
            return [[stage] for stage in self.stages]
        kinds = ([stage for stage in self.stages if stage.name.startswith(kind)] for kind in (MEASURE, _QUANTIZE))
        denoisers = [stages for stages in kinds if stages]
        return [*denoisers, *([stage] for stage in self.stages if not any(stage in stages for stages in denoisers))]


def estimate(  # noqa: PLR0913 (what the run is, and how this machine does it)
    source: SourceModel,
    recipe: Recipe,
    *,
    devices: Sequence[str],
    num_samples: Mapping[str, int],
    records: bool,
    link: bool,
    hidden_ram_bytes: int,
    memory: str = "resident",
    gemm_rates: Mapping[str, float] | None = None,
) -> RunEstimate:
    """Estimate a run of `quantize`. Bytes on disk are exact except for small files; the rest is an
    estimate.

    Args:
        source: the 16-bit pipeline.
        recipe: resolved: size, frames, steps and samples are set if it needs calibration.
        devices: one, or one for each denoiser.
        num_samples: calibration samples of each denoiser; if they are recorded, the most that are
            wanted.
        records: whether the run records them, with the whole pipeline in memory.
        link: whether components that are not quantized are linked instead of copied.
        hidden_ram_bytes: of hidden states kept in RAM, for each denoiser.
        memory: where the 16-bit pipeline is held while it records, "resident", "swap" or "disk".
        gemm_rates: floating-point operations a second by device, see `measure_gemm_rate`; None
            leaves times out.

    Raises:
        ModelError: the model's files are missing or damaged.
    """
    places = dict(zip(source.denoiser_names, itertools.cycle(devices), strict=False))
    counts = _recorded(source, recipe, num_samples) if records else num_samples
    costs = {e: DenoiserCosts(source, e, recipe, counts.get(e, 0), places[e]) for e in source.denoiser_names}
    side_by_side = len(devices) > 1
    store = _store_bytes(source, costs, recipe) if records else 0
    copied = 0 if link else _other_bytes(source)
    stages = [_recording(source, recipe, costs, devices, memory, store, gemm_rates)] if records else []
    on_disk = store
    all_hidden = sum(cost.hidden_bytes for cost in costs.values()) if side_by_side else 0
    for denoiser, cost in costs.items():
        on_disk += cost.output_bytes
        disk = on_disk + (all_hidden or cost.hidden_bytes)
        stages.append(_quantizing(denoiser, cost, places[denoiser], hidden_ram_bytes, disk, gemm_rates))
    hashed = sum(cost.output_bytes for cost in costs.values()) + copied
    seconds = None if gemm_rates is None else hashed / _COPY_BYTES_PER_S
    stages.append(StageEstimate("write", seconds, _LIBRARIES_GIB, 0.0, (on_disk + copied) / GIB))
    return RunEstimate(tuple(stages), side_by_side)


def _recorded(source: SourceModel, recipe: Recipe, num_wanted: Mapping[str, int]) -> dict[str, int]:
    """Return the samples that a recording keeps: the wanted number, or all calls if there are
    fewer.
    """
    if recipe.num_steps is None:
        return dict(num_wanted)
    steps = [step.denoiser for step in sampling_steps(source, _settings(source, recipe))]
    calls_a_step = recipe.num_prompts * _num_branches(source, recipe)
    return {denoiser: min(wanted, steps.count(denoiser) * calls_a_step) for denoiser, wanted in num_wanted.items()}


def _settings(source: SourceModel, recipe: Recipe) -> SamplingSettings:
    """Return the sampling settings of recording: the recipe's, and else the model's own."""
    said = {name: getattr(recipe, name, None) for name in vars(published_settings(source))}
    return default_settings(source).replace(**said)


def _num_branches(source: SourceModel, recipe: Recipe) -> int:
    """Return the guidance branches of one step of one prompt."""
    return source.family.num_branches(source.index, _settings(source, recipe))


def _quantizing(
    denoiser: str,
    cost: DenoiserCosts,
    device: str,
    hidden_ram_bytes: int,
    disk_bytes: float,
    gemm_rates: Mapping[str, float] | None,
) -> StageEstimate:
    kind = torch.device(device).type
    hidden = min(hidden_ram_bytes, cost.hidden_bytes)
    computing = cost.peak_bytes(DEFAULT_TOKENS) / GIB
    held = _LIBRARIES_GIB + (hidden + cost.output_bytes / cost.num_blocks) / GIB
    on_gpu = kind == "cuda"
    memory, gpu = (held, computing) if on_gpu else (held + computing, 0.0)
    seconds = None
    if gemm_rates is not None:
        work, rate = cost.operations(), gemm_rates[device]
        seconds = (
            cost.weight_bytes / _READ_BYTES_PER_S
            + work.forward / (_FORWARD_SHARE[kind] * rate)
            + work.statistics / (_STATISTICS_SHARE[kind] * rate)
            + work.solving / (_SOLVING_SHARE[kind] * rate)
            + work.searching / (_SEARCHING_SHARE[kind] * rate)
            + work.num_columns * _COLUMN_S[kind]
        )
    return StageEstimate(f"{_QUANTIZE}{denoiser}", seconds, memory, gpu, disk_bytes / GIB)


def _recording(
    source: SourceModel,
    recipe: Recipe,
    costs: Mapping[str, DenoiserCosts],
    devices: Sequence[str],
    memory: str,
    store_bytes: int,
    gemm_rates: Mapping[str, float] | None,
) -> StageEstimate:
    """Estimate recording: the pipeline in memory once for each device, sampling every prompt to its
    end, the most that it takes.
    """
    kind = torch.device(devices[0]).type
    num_workers = min(len(devices), recipe.num_prompts)
    first = next(iter(costs.values()))
    denoisers = sum(cost.weight_bytes for cost in costs.values())
    others = {name: _loaded_bytes(source.components[name], first.dtype) for name in source.other_components}
    encoding = others.get(source.family.autoencoder, 0) + first.encoding_bytes
    one_block = first.weight_bytes - (first.num_blocks - 1) * first.block_bytes
    held, on_device = {
        "resident": (0, denoisers + sum(others.values()) + max(first.activation_bytes, encoding)),
        "swap": (
            denoisers + sum(others.values()),
            max(*others.values(), first.weight_bytes + first.activation_bytes, encoding),
        ),
        "disk": (0, max(*others.values(), one_block + first.activation_bytes, encoding)),
    }[memory]
    on_gpu = kind == "cuda"
    ram_gib = num_workers * (_LIBRARIES_GIB + (held if on_gpu else held + on_device) / GIB)
    seconds = None
    if gemm_rates is not None:
        num_calls = (
            math.ceil(recipe.num_prompts / num_workers) * (recipe.num_steps or 0) * _num_branches(source, recipe)
        )
        passes = num_calls * first.num_blocks * first.forward_operations
        num_loads = num_calls if memory == "disk" else 2  # of one denoiser
        seconds = num_loads * first.weight_bytes / _READ_BYTES_PER_S + passes / (
            _FORWARD_SHARE[kind] * gemm_rates[devices[0]]
        )
    return StageEstimate("record", seconds, ram_gib, on_device / GIB if on_gpu else 0.0, store_bytes / GIB)


def _store_bytes(source: SourceModel, costs: Mapping[str, DenoiserCosts], recipe: Recipe) -> int:
    """Bound the bytes of samples, and of the tensors that those of a prompt share in each guidance
    branch.
    """
    texts = recipe.num_prompts * _num_branches(source, recipe) * next(iter(costs.values())).text_bytes
    return texts + sum(cost.recorded_bytes for cost in costs.values())


def _other_bytes(source: SourceModel) -> int:
    """Return the bytes of the unquantized components' files."""
    files = (file for name in source.other_components for file in (source.folder / name).rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _loaded_bytes(component: Component, dtype: torch.dtype) -> int:
    """Return the bytes of a component's parameters in memory; 0 without any. Raises ModelError for
    a damaged file.
    """
    if not component.has_weights:
        return 0
    return sum(math.prod(form.shape) for _, form in component.forms.values()) * dtype.itemsize


def check_disk(folder: Path, needed_bytes: int, already_there_bytes: int = 0) -> None:
    """Raise OutputError if the disk of `folder`, which need not exist yet, has no room for a run.

    Args:
        needed_bytes: the most that the run has on the disk at any time.
        already_there_bytes: how much of it an earlier run left there.
    """
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    missing = needed_bytes - already_there_bytes
    if missing > free:
        raise OutputError(
            f"{folder} needs {missing / GIB:.1f} GiB more and its disk has {free / GIB:.1f} GiB free: free some, "
            "choose another disk, link unquantized components (--link), or calibrate on fewer samples."
        )


def measure_gemm_rate(device: str, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Measure the floating-point operations a second of this device on large matrix products, for
    `seconds`.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = 8192 if on_gpu else 2048
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(left, right)  # the first one loads the library
    num_products, started = 0, time.perf_counter()
    while True:
        torch.mm(left, right)
        num_products += 1
        if on_gpu:
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return num_products * 2 * size**3 / elapsed
