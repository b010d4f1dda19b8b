"""`tempoquant plan`: the GPU memory that a video will need, before anything is fetched or
quantized.
"""

from typing import Annotated

import typer

from tempoquant.cli.options import Frames, Json, Size
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress

NOTHING_FITS = 1
"""Exit code if the quantized model fits a given machine in no mode."""

PlannedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|DIR",
        help="A 16-bit or quantized diffusers folder or hub id, of which only configs are read; or wan2.2-i2v-a14b.",
    ),
]


def command(
    model: PlannedModel = "wan2.2-i2v-a14b",
    size: Size = None,
    frames: Frames = None,
    gpu_gib: Annotated[
        float | None, typer.Option(min=1.0, metavar="G", help="Memory of the GPU, for which to recommend a mode.")
    ] = None,
    ram_gib: Annotated[
        float | None, typer.Option(min=1.0, metavar="G", help="Memory of the host, which decides with the GPU's.")
    ] = None,
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="Recipe for quantizing a 16-bit model.")] = "default",
    as_json: Json = False,
) -> None:
    """Predict a generation's peak memory by phase and memory mode; the default is 480x832 and 81
    frames.

    Exits with 1 if a GPU's memory or RAM is given, and the quantized model fits in no mode.
    """

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.memory_table import Machine, memory_record, memory_tables
        from tempoquant.models.pipeline_configs import read_configs
        from tempoquant.planning.memory_plan import plan_memory
        from tempoquant.recipe import Recipe

        configs = read_configs(model)
        settings = configs.family.published(configs.index)[1].replace(
            height=size and size.height, width=size and size.width, num_frames=frames
        )
        done = progress.start("Tracing", 1)
        plan = plan_memory(configs, settings, Recipe.load(recipe))
        done()
        machine = Machine(*(None if gib is None else gib * 2**30 for gib in (gpu_gib, ram_gib)))
        code = 0 if not machine.is_known or machine.fastest(plan.quantized) is not None else NOTHING_FITS
        return Outcome(memory_record(plan, machine), Group(*memory_tables(plan, machine)), code)

    run_command(work, as_json)
