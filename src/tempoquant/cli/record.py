"""`tempoquant record`: calibration samples of a 16-bit pipeline, for `quantize --store`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempoquant.cli.engine_options import Address, EngineName, EngineOption, Workers, engine_of
from tempoquant.cli.json_log import JsonLogFile
from tempoquant.cli.lora_options import Loras, parse_loras
from tempoquant.cli.options import (
    Calibration,
    FlowShift,
    Frames,
    GuidanceScale,
    Json,
    Model,
    Overwrite,
    RecordingMemory,
    RecordingMode,
    SamplesPerDenoiser,
    Seed,
    Size,
    Steps,
    sampling_changes,
)
from tempoquant.cli.running import GOES_ON, Outcome, run_command
from tempoquant.cli.source_options import Base, Denoisers, Family, model_of
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.calibrate.store import SampleStore
    from tempoquant.models.source import SourceModel
    from tempoquant.recording.plan import RecordingPlan

NUM_PROMPTS = 12


def command(  # noqa: PLR0913 (one argument per option)
    output: Annotated[Path, typer.Option("--output", "-o", metavar="STORE", help="Folder to write; new, or empty.")],
    model: Model = None,
    calibration: Calibration = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts, from the first on.")] = NUM_PROMPTS,
    samples_per_denoiser: SamplesPerDenoiser = None,
    steps: Steps = None,
    frames: Frames = None,
    size: Size = None,
    guidance_scale: GuidanceScale = None,
    flow_shift: FlowShift = None,
    base: Base = None,
    denoiser: Denoisers = None,
    family: Family = None,
    lora: Loras = None,
    from_latents: Annotated[
        bool,
        typer.Option("--from-latents", help="Noise encoded clips ({prompt, video}) instead of sampling."),
    ] = False,
    seed: Seed = 0,
    device: Workers = None,
    engine: EngineOption = EngineName.LOCAL,
    address: Address = None,
    memory: RecordingMemory = RecordingMode.RESIDENT,
    overwrite: Overwrite = False,
    json_log: JsonLogFile = None,
    as_json: Json = False,
) -> None:
    """Record calibration samples: run the 16-bit pipeline on prompts.

    The store keeps some of its transformer calls. Size, frames, steps, guidance and flow shift
    default to the model's own. With --lora they follow files that state their number of steps
    ("4steps" in the name). Finished prompts are kept in STORE.unfinished until all are finished:
    the same command resumes there.
    """
    changes = sampling_changes(size, frames, steps, guidance_scale, flow_shift)
    named, loras = model_of(model, base, denoiser, family=family), parse_loras(lora)

    def work(progress: Progress) -> Outcome:
        from tempoquant.models.fingerprint import fingerprint
        from tempoquant.models.source import SourceModel
        from tempoquant.placement.streaming import check_memory
        from tempoquant.recording.plan import ModelIdentity
        from tempoquant.recording.record import record

        workers = engine_of(engine, address, device)
        check_memory(memory.value, workers.device)
        source = SourceModel.open(named)
        drawn = {"calibration": calibration, "prompts": prompts, "seed": seed, "from_latents": from_latents}
        plan = make_plan(str(named), source, drawn, changes, loras, samples_per_denoiser)
        existed = (output / "store.json").is_file() and not overwrite
        identity = ModelIdentity(fingerprint(source, progress), source.hub_id, source.revision)
        store = record(
            source,
            output,
            plan,
            model=identity,
            engine=workers,
            memory=memory.value,
            overwrite=overwrite,
            progress=progress,
        )
        return describe(store, existed)

    run_command(work, as_json, json_log, interrupted=GOES_ON)


def make_plan(
    model: str,
    source: "SourceModel",
    drawn: dict[str, Any],
    changes: dict[str, Any],
    loras: dict[str, list[tuple[Path, float]]],
    samples_per_denoiser: int | None,
) -> "RecordingPlan":
    """Plan a recording: the model's own settings, overridden by LoRAs that state their number of
    steps, then by the flags.

    Raises CalibrationError for missing prompts, SettingsError for wrong settings, ModelError for a
    bad LoRA file.
    """
    from tempoquant.models.lora.given import load_loras, sampler_with, sampler_words
    from tempoquant.models.sampling_file import settings_of
    from tempoquant.recording.plan import RecordingPlan, default_samples_per_denoiser
    from tempoquant.recording.prompt_sets import calibration_prompts

    fused = load_loras(source, loras)
    if fused:
        changes = sampler_with(source.family, fused, changes)
        typer.echo(f"With LoRAs in the weights, sampling with {sampler_words(changes)}.", err=True)
    settings = settings_of(source, changes)
    return RecordingPlan(
        prompts=calibration_prompts(model, drawn["calibration"], drawn["prompts"]),
        settings=settings,
        samples_per_denoiser=samples_per_denoiser or default_samples_per_denoiser(settings, source.geometry),
        seed=drawn["seed"],
        loras=fused,
        from_latents=drawn["from_latents"],
    )


def describe(store: "SampleStore", existed: bool) -> Outcome:
    """Describe a store: the number of samples of each denoiser, and of the timesteps that they
    cover.
    """
    counts, words = {}, []
    for denoiser in store.denoisers:
        entries = store.entries(denoiser)
        num_steps = len({entry.step_index for entry in entries})
        counts[denoiser] = {
            "num_samples": len(entries),
            "num_timesteps": num_steps,
            "num_prompts": len({entry.prompt_id for entry in entries}),
        }
        words.append(f"{len(entries)} of {denoiser} at {num_steps} of its {len(store.schedule(denoiser))} timesteps")
    record = {
        "output": str(store.folder),
        "existed": existed,
        "digest": store.digest,
        "denoisers": counts,
        "settings": store.settings,
        "seed": store.provenance["seed"],
    }
    state = "was already finished" if existed else "written"
    return Outcome(record, f"{store.folder} {state}: samples {' and '.join(words)}, {len(store.prompts)} prompts.")
