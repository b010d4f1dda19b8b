"""Recording of calibration samples: the kept transformer calls of the 16-bit pipeline, and their
sample store.

The calls to keep are chosen before anything runs, from the scheduler's timesteps. Each finished
prompt is on disk, so a killed recording resumes at the next one and writes the same bytes.
"""

import functools
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tempoquant.calibrate.store import SampleStore
from tempoquant.calibrate.store_index import INDEX_NAME, SampleEntry
from tempoquant.calibrate.store_writer import StoreWriter
from tempoquant.device import compute_dtype
from tempoquant.engines import Crew, Engine
from tempoquant.engines.crew import InProcessCrew
from tempoquant.errors import CalibrationError, OutputError
from tempoquant.models.prompt_needs import require_texts_alone
from tempoquant.models.schedule import sampling_steps
from tempoquant.models.source import SourceModel
from tempoquant.output.work_folder import WorkFolder
from tempoquant.placement.modes import RecordingMemory
from tempoquant.placement.streaming import check_memory
from tempoquant.progress import SILENT, CombinedProgress, Progress
from tempoquant.recording.plan import (
    Calls,
    ModelIdentity,
    RecordingPlan,
    Wanted,
    plan_provenance,
    require_prompts,
    wanted_calls,
)
from tempoquant.recording.stages import NOISING, SAMPLING, NoisingClips, SamplingPrompts, ToRecord

_STORE = "store"


def record(
    source: SourceModel,
    folder: Path,
    plan: RecordingPlan,
    *,
    model: ModelIdentity,
    engine: Engine,
    memory: RecordingMemory = "resident",
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> SampleStore:
    """Record into a folder that appears once it is complete; a finished store of the same plan is
    left unchanged.

    Until then, finished prompts are in `FOLDER.unfinished`, where the same recording resumes.

    Args:
        source: the 16-bit pipeline.
        folder: new, empty, or an earlier store.
        engine: where it runs; each worker has its own pipeline and takes one prompt after the
            other.
        overwrite: replace the content of `folder`, and another recording's unfinished work.

    Raises:
        OutputError: `folder` holds something else (the difference is named), cannot be written, or
            the disk is full.
        CalibrationError: a prompt lacks something, an input holds NaN or Inf, or a denoiser has no
            step.
        ModelError, SettingsError: as `loaded_pipeline`, `require_prompts` and `sampling_steps`
            raise them.
    """
    device = engine.device
    _check_memory(source, plan, memory, device)
    folder = folder.expanduser().resolve()
    for place in source.places:
        if place.resolve().is_relative_to(folder) or folder.is_relative_to(place.resolve()):
            raise OutputError(f"{folder} and the model in {place} overlap: choose a folder beside it.")
    source.geometry.require(plan.settings)
    require_prompts(source, plan)
    steps = sampling_steps(source, plan.settings)
    wanted = wanted_calls(source, plan, steps)
    facts = plan_provenance(source, plan, model, device)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: give a folder.")
    work = WorkFolder(folder, {**facts, "samples_per_denoiser": plan.samples_per_denoiser})
    if not overwrite and folder.exists() and any(folder.iterdir()):
        store = _require_same(folder, facts, wanted, plan)
        work.tidy()
        return store
    with work.owned(overwrite) as path, engine.open(path) as crew:
        record_into(
            source, path / _STORE, plan, model=model, device=device, memory=memory, crew=crew, progress=progress
        )
        _appear(path / _STORE, folder, path / "replaced")
        work.remove()
    return SampleStore.open(folder)


def _check_memory(source: SourceModel, plan: RecordingPlan, memory: RecordingMemory, device: str) -> None:
    """Raise SettingsError for a mode that is not there, or not for what the prompts bring."""
    check_memory(memory, device)
    if memory == "disk":
        require_texts_alone(source, plan.prompts)


def record_into(
    source: SourceModel,
    folder: Path,
    plan: RecordingPlan,
    *,
    model: ModelIdentity,
    device: str,
    memory: RecordingMemory = "resident",
    crew: Crew | None = None,
    progress: Progress = SILENT,
) -> SampleStore:
    """Record into a folder that only the caller uses, and resume the work of an earlier call with
    the same plan.

    Args:
        device: a device's name on the workers.
        crew: the workers, each with its own pipeline; this process if left out.

    Raises as `record` does; finished prompts stay in the folder.
    """
    _check_memory(source, plan, memory, device)
    steps = sampling_steps(source, plan.settings)
    wanted = wanted_calls(source, plan, steps)
    facts = plan_provenance(source, plan, model, device)
    if (folder / INDEX_NAME).is_file():
        store = SampleStore.open(folder)
        if not _differences(store, facts, wanted, plan):
            StoreWriter(folder, source.family.text_inputs).tidy()
            return store
    writer = StoreWriter(folder, source.family.text_inputs)
    left = {index: calls for index, calls in wanted.items() if not _is_recorded(writer, index, calls)}
    if left:
        _check_space(source, folder, plan, left, device)
        _record_left(source, folder.absolute(), plan, wanted, left, memory, crew or InProcessCrew(device), progress)
    schedule = {
        name: [float(step.timestep) for step in steps if step.denoiser == name] for name in source.denoiser_names
    }
    return writer.finish(facts, schedule, sorted(wanted))


def _record_left(
    source: SourceModel,
    folder: Path,
    plan: RecordingPlan,
    wanted: Wanted,
    left: Wanted,
    memory: RecordingMemory,
    crew: Crew,
    progress: Progress,
) -> None:
    stage: SamplingPrompts | NoisingClips
    if plan.from_latents:
        stage = NoisingClips(source, folder, plan, tuple(left))
        together = CombinedProgress(progress, NOISING, len(wanted), len(wanted) - len(left))
    else:
        stage = SamplingPrompts(source, folder, plan, memory, tuple(left))
        num_steps = {index: 1 + max(step for step, _ in calls) for index, calls in wanted.items()}
        done = sum(num for index, num in num_steps.items() if index not in left)
        together = CombinedProgress(progress, SAMPLING, sum(num_steps.values()), done)
    items = [ToRecord(index, calls) for index, calls in left.items()]
    writer_of = functools.partial(StoreWriter, folder, source.family.text_inputs)
    crew.run(
        stage,
        items,
        progress=together,
        is_done=lambda item: _is_recorded(writer_of(), item.prompt_index, item.calls),
    )


def _is_recorded(writer: StoreWriter, index: int, calls: Calls) -> bool:
    return _calls_of(writer.committed(index)) == calls


def _calls_of(entries: Iterable[SampleEntry] | None) -> Calls:
    return frozenset((entry.step_index, entry.guidance_branch) for entry in entries or ())


def _stored_calls(store: SampleStore) -> Mapping[str, Calls]:
    """Return each prompt's calls by its id."""
    entries = [entry for denoiser in store.denoisers for entry in store.entries(denoiser)]
    return {id: _calls_of(e for e in entries if e.prompt_id == id) for id in {entry.prompt_id for entry in entries}}


def _differences(store: SampleStore, facts: Mapping[str, Any], wanted: Wanted, plan: RecordingPlan) -> list[str]:
    """Return the differences between a store and the planned recording."""
    different = [key for key, value in facts.items() if store.provenance[key] != value]
    if not different and _stored_calls(store) != {plan.prompts[index].id: calls for index, calls in wanted.items()}:
        different = ["samples_per_denoiser"]
    return different


def _require_same(folder: Path, facts: Mapping[str, Any], wanted: Wanted, plan: RecordingPlan) -> SampleStore:
    """Return the finished store in a folder. Raises OutputError if the folder holds anything
    else.
    """
    try:
        store = SampleStore.open(folder)
    except CalibrationError as error:
        raise OutputError(f"{error} Choose another folder, or --overwrite.") from error
    if different := _differences(store, facts, wanted, plan):
        raise OutputError(
            f"{folder} holds other samples (different {' and '.join(different)}): choose another folder, or "
            "--overwrite."
        )
    return store


def _check_space(source: SourceModel, folder: Path, plan: RecordingPlan, left: Wanted, device: str) -> None:
    """Raise OutputError if the disk has no room for the samples that are still to be recorded."""
    settings = plan.settings
    sizes = source.sample_sizes(source.denoiser_names[0], settings.height, settings.width, settings.num_frames)
    num_samples = sum(len(calls) for calls in left.values())
    num_values = num_samples * sizes.video_values + len(left) * plan.num_branches(source) * sizes.text_values
    needed = num_values * compute_dtype(device).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{num_samples} samples need {needed / 2**30:.1f} GiB and the disk of {folder} has {free / 2**30:.1f} GiB "
            "free: free some, choose another folder, or ask for fewer samples."
        )


def _appear(finished: Path, folder: Path, aside: Path) -> None:
    """Rename; if that fails, also by Ctrl-C, the previous content comes back."""
    try:
        if folder.exists():
            folder.rename(aside)
        try:
            finished.rename(folder)
        except BaseException:
            if aside.exists():
                aside.rename(folder)
            raise
    except OSError as error:
        raise OutputError(f"{folder} could not be written: {error.strerror or error}.") from error
