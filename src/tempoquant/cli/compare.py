"""`tempoquant compare`: the distance of a quantized pipeline from its reference."""

import functools
from typing import TYPE_CHECKING, Annotated

import typer

from tempoquant.cli.lora_options import ReferenceLoras, parse_loras
from tempoquant.cli.options import (
    Activations,
    Device,
    FlowShift,
    Frames,
    GenerationMemory,
    GuidanceScale,
    Json,
    MemoryMode,
    Seed,
    Size,
    Steps,
    sampling_changes,
)
from tempoquant.cli.running import Outcome, run_command
from tempoquant.cli.source_options import Base, Denoisers, Family, places_of, reference_and_folders
from tempoquant.progress import Progress

if TYPE_CHECKING:
    pass

NUM_SAMPLES = 8


def command(  # noqa: PLR0913 (one argument per option)
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[REFERENCE] DIR", help="REFERENCE: the model that DIR was quantized from, unless --base gives it."
        ),
    ],
    samples: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = NUM_SAMPLES,
    samples_from: Annotated[
        str | None,
        typer.Option(metavar="FILE|FOLDER", help="A jsonl file of {prompt, image}; bundled models have their own."),
    ] = None,
    steps: Steps = None,
    frames: Frames = None,
    size: Size = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    base: Base = None,
    denoiser: Denoisers = None,
    family: Family = None,
    lora: ReferenceLoras = None,
    seed: Seed = 0,
    activation_bits: Activations = None,
    memory: GenerationMemory = MemoryMode.RESIDENT,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Generate the same videos with both models, and measure the difference.

    The measures are SQNR, PSNR, SSIM and, for a bundled model, prompt adherence. Size, frames,
    steps, guidance and flow shift default to the reference's own.
    """
    reference, folders = reference_and_folders(names, base, denoiser, family)
    if len(folders) > 1:
        raise typer.BadParameter("give one, or several to `tempoquant evaluate`.", param_hint="'DIR'")
    [folder] = folders
    loras = parse_loras(lora)
    changes = sampling_changes(size, frames, steps, guidance_scale, flow_shift)

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.tables import bins_table, comparison_table
        from tempoquant.device import default_device
        from tempoquant.evaluate.compare import Task, compare
        from tempoquant.hosts.diffusers.pipeline import open_pipeline
        from tempoquant.models.lora.given import with_loras
        from tempoquant.models.pipeline_folder import BUNDLED_MODELS
        from tempoquant.models.sampling_file import settings_of
        from tempoquant.placement.cpu_threads import suited_threads
        from tempoquant.recording.prompt_sets import evaluation_prompts
        from tempoquant.runtime.activation_bits import set_activation_bits

        prompts = evaluation_prompts(str(reference), samples_from, samples)
        source = with_loras(open_pipeline(reference), loras)
        settings = settings_of(source, changes)
        task = Task(prompts, settings, seed, in_bundled_world=str(reference) in BUNDLED_MODELS)
        _, label = places_of(folder)
        prepare = None
        if activation_bits is not None:
            label += f", activations in {activation_bits} bits"
            prepare = functools.partial(
                set_activation_bits, bits=activation_bits.bits, timesteps=activation_bits.timesteps
            )
        with suited_threads(source, device or default_device()):
            comparison = compare(
                source, {label: open_pipeline(folder)}, task, device, progress, prepare, memory.value
            ).comparison
        tables = [comparison_table(comparison), bins_table(comparison)]
        return Outcome(comparison.to_dict(), Group(*(table for table in tables if table is not None)))

    run_command(work, as_json)
