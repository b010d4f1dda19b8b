"""`tempoquant plan`: the memory that a video will need, and the time that it will take, before
anything is fetched or quantized.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempoquant.cli.options import Frames, FrameSize, GuidanceScale, Json, Size, Steps, sampling_changes
from tempoquant.cli.running import Outcome, run_command
from tempoquant.cli.speed_options import SpeedName
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.planning.gpus import Gpu

NOTHING_FITS = 1
"""Exit code if the quantized model fits a given machine in no mode."""

PlannedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|DIR",
        help="A 16-bit or quantized diffusers folder or hub id, of which only configs are read; or wan2.2-i2v-a14b.",
    ),
]
GpuGib = Annotated[
    float | None, typer.Option(min=1.0, metavar="G", help="Memory of the GPU, for which to recommend a mode.")
]
RamGib = Annotated[
    float | None, typer.Option(min=1.0, metavar="G", help="Memory of the host, which decides with the GPU's.")
]
RecipeName = Annotated[str, typer.Option(metavar="NAME|FILE", help="Recipe for quantizing a 16-bit model.")]
Time = Annotated[
    bool, typer.Option("--time", help="Predict the time of a step and a video by part, on all known GPUs or on one.")
]
GpuName = Annotated[
    str | None, typer.Option(metavar="NAME", help="GPU whose kernels and datasheet count, such as rtx-4090.")
]
ComputeCapability = Annotated[
    str | None, typer.Option(metavar="X.Y", help="A typical GPU of this compute capability, in place of --gpu.")
]
Rates = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        dir_okay=False,
        exists=True,
        help="Rates that `python -m benchmarks.gpu_first_day` measured on the GPU.",
    ),
]
PlannedSpeeds = Annotated[
    list[SpeedName] | None,
    typer.Option(
        "--speed", help="Speed of the quantized model; all three by default. May be repeated.", show_default=False
    ),
]


def command(  # noqa: PLR0913 (options of the command line)
    model: PlannedModel = "wan2.2-i2v-a14b",
    size: Size = None,
    frames: Frames = None,
    gpu_gib: GpuGib = None,
    ram_gib: RamGib = None,
    recipe: RecipeName = "default",
    modulation: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Overrides the recipe: 4-bit format of modulation's weights.")
    ] = None,
    time: Time = False,
    gpu: GpuName = None,
    compute_capability: ComputeCapability = None,
    rates: Rates = None,
    speed: PlannedSpeeds = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    as_json: Json = False,
) -> None:
    """Predict a generation's peak memory by phase and memory mode.

    The default is 480x832 and 81 frames. With --time, the command also predicts the time by part.
    It exits with 1 if a GPU's memory or RAM is given, and the quantized model fits in no mode.
    """
    about_time = {
        "--rates": rates,
        "--speed": speed,
        "--steps": steps,
        "--guidance-scale": guidance_scale,
    }
    if not time and (given := [name for name, value in about_time.items() if value]):
        raise typer.BadParameter(f"{', '.join(given)}: these options need --time.")
    if gpu is not None and compute_capability is not None:
        raise typer.BadParameter("--gpu and --compute-capability both name a GPU: give one of them.")

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.memory_table import Machine, memory_record, memory_tables, recommendations
        from tempoquant.cli.quantize import resolve_recipe
        from tempoquant.cli.time_table import time_record, time_tables
        from tempoquant.models.pipeline_configs import read_configs
        from tempoquant.planning.memory_plan import plan_memory
        from tempoquant.planning.traced_video import trace_video

        asked = _asked_gpu(gpu, compute_capability)
        gpus = _gpus(asked, rates) if time else []
        configs, resolved = read_configs(model), resolve_recipe(recipe, {"modulation_format": modulation})
        settings = _settings(configs, size, frames, steps, guidance_scale)
        advance = progress.start("Tracing", 2 if time else 1)
        plan = plan_memory(configs, settings, resolved, capability=None if asked is None else asked.capability)
        advance()
        machine = Machine(*(None if gib is None else gib * 2**30 for gib in (gpu_gib, ram_gib)))
        code = 0 if not machine.is_known or machine.fastest(plan.quantized) is not None else NOTHING_FITS
        record = memory_record(plan, machine)
        if not time:
            return Outcome(record, Group(*memory_tables(plan, machine)), code)
        video = trace_video(configs, settings, resolved)
        advance()
        speeds = [each.value for each in SpeedName if not speed or each in speed]
        record["time"] = time_record(video, plan, machine, gpus, speeds)
        return Outcome(record, Group(*time_tables(record), *recommendations(plan, machine)), code)

    run_command(work, as_json)


def _settings(
    configs: Any, size: FrameSize | None, frames: int | None, steps: int | None, guidance_scale: float | None
) -> Any:
    own = configs.family.published(configs.index)[1]
    changes = sampling_changes(size, frames, steps, guidance_scale, None)
    if steps is not None and own.sigmas is not None and steps != own.num_steps:
        own = own.from_dict({**own.to_dict(), "sigmas": None, "num_steps": steps})
    return own.replace(**changes)


def _asked_gpu(name: str | None, capability: str | None) -> "Gpu | None":
    """Return the GPU that was asked about, None for no one. Raises SettingsError."""
    from tempoquant.planning.gpus import gpu_named, gpu_of_capability

    return gpu_named(name) if name else gpu_of_capability(capability) if capability else None


def _gpus(asked: "Gpu | None", rates: Path | None) -> "list[Gpu]":
    """Return the GPUs whose time is predicted: one, or all known ones. Raises SettingsError."""
    from tempoquant.planning.gpus import GPUS
    from tempoquant.planning.measured_rates import measured_gpu

    if rates is not None:
        return [measured_gpu(rates, asked)]
    return list(GPUS.values()) if asked is None else [asked]
