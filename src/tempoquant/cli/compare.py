"""`tempoquant compare`: how far a quantized pipeline is from its reference."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempoquant.cli.options import (
    Activations,
    Device,
    FlowShift,
    Folder,
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
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.evaluate.compare import Task

NUM_SAMPLES = 8


def command(  # noqa: PLR0913 (one argument per option)
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="What DIR was quantized from.")],
    folder: Folder,
    samples: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = NUM_SAMPLES,
    samples_from: Annotated[
        str | None,
        typer.Option(metavar="FILE|FOLDER", help="jsonl of {image, prompt} (bundled models have their own)."),
    ] = None,
    steps: Steps = None,
    frames: Frames = None,
    size: Size = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    seed: Seed = 0,
    activation_bits: Activations = None,
    memory: GenerationMemory = MemoryMode.RESIDENT,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Generate the same videos with both and measure SQNR, PSNR, SSIM and, on a bundled model, prompt adherence.

    What is not given is the reference's own: size, frames, steps, guidance, flow shift.
    """
    changes = sampling_changes(size, frames, steps, guidance_scale, flow_shift)

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.tables import bins_table, comparison_table
        from tempoquant.evaluate.compare import compare
        from tempoquant.integrations.cpu_threads import suited_threads
        from tempoquant.integrations.pipeline_folder import resolve_model
        from tempoquant.integrations.wan import default_device
        from tempoquant.runtime.activation_bits import set_activation_bits

        task = held_out_task(reference, samples, samples_from, seed, changes)
        # A folder's own name, so that two results of one recipe stay apart; "." has none before it is resolved.
        label = folder.resolve().name
        prepare = None
        if activation_bits is not None:
            label += f", activations in {activation_bits} bits"
            prepare = functools.partial(set_activation_bits, bits=activation_bits.bits,
                                        timesteps=activation_bits.timesteps)  # fmt: skip
        source = resolve_model(reference)
        with suited_threads(source, device or default_device()):
            comparison = compare(source, {label: folder}, task, device, progress, prepare, memory.value).comparison
        tables = [comparison_table(comparison), bins_table(comparison)]
        return Outcome(comparison.to_dict(), Group(*(table for table in tables if table is not None)))

    run_command(work, as_json)


def held_out_task(
    reference: str, num_prompts: int, samples_from: str | None, seed: int, changes: Mapping[str, Any]
) -> "Task":
    """What both sides are asked: prompts of a file, or of a bundled model's evaluation set, at the model's settings.

    Args:
        changes: of the model's settings; None leaves one as it is.

    Raises CalibrationError when there are too few prompts, ModelError when there is no such model, SettingsError for
    settings that no model can run.
    """
    from tempoquant.evaluate.compare import Task
    from tempoquant.integrations.pipeline_folder import BUNDLED_MODELS, resolve_model
    from tempoquant.integrations.prompt_sets import evaluation_prompts
    from tempoquant.integrations.sampling import settings_of

    prompts = evaluation_prompts(reference, samples_from, num_prompts)
    settings = settings_of(resolve_model(reference), changes)
    return Task(prompts, settings, seed, in_bundled_world=reference in BUNDLED_MODELS)
