"""Evaluation of quantized models and their reference on a benchmark: everything is kept, and an
interrupted run resumes.

The reference comes first, then each model; a worker has one pipeline in memory at a time.
evaluation.json is rewritten after every model.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tempoquant.device import compute_dtype, default_device
from tempoquant.engines import Crew, Engine, Local
from tempoquant.errors import ModelError
from tempoquant.evaluate.benchmark_sets import Item, fitting, select
from tempoquant.evaluate.disk_space import check_space
from tempoquant.evaluate.evaluation_folder import EVALUATION, EvaluationFolder
from tempoquant.evaluate.evaluation_record import evaluation_record
from tempoquant.evaluate.files import write_text
from tempoquant.evaluate.generation import Generating, generate_missing
from tempoquant.evaluate.measuring import Measuring, measure_missing
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.reference_loras import warn_of_other_loras
from tempoquant.evaluate.request import Request
from tempoquant.evaluate.text_embeddings import has_quantized_text_encoder
from tempoquant.evaluate.vbench.settings import check_vbench
from tempoquant.evaluate.vbench.summary import scored_by_vbench
from tempoquant.hosts.contents import calibration_prompts_of, configs_of
from tempoquant.models.clips import clip_hash
from tempoquant.models.fingerprint import fingerprint, outline
from tempoquant.models.prompt_needs import lacking
from tempoquant.progress import SILENT, Progress


def evaluate(
    request: Request, output: Path, engine: Engine | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Generate, measure and summarize; resume an interrupted run.

    Args:
        output: a new or empty folder, or one of an earlier run with these settings.
        engine: where to run; None for CUDA if there is a GPU, else the CPU, in this process.

    Returns:
        The content of evaluation.json.

    Raises:
        CalibrationError: an item lacks an input of the models, a model was calibrated on it, or
            there is no item.
        ModelError: a folder is no such pipeline, or a model made no video at all.
        OutputError: the folder belongs to something else, cannot be written, or its disk has no
            room for the remaining files.
        TempoQuantError: the engine has no worker left.
        EvaluationError: VBench was asked for and cannot run, or could score nothing.
    """
    engine, output = engine or Local((default_device(),)), output.resolve()
    _check_alike(request.sides)
    configs = {model.label: configs_of(model.source.folder) for model in request.models}
    warn_of_other_loras(request.reference.source, configs)
    request = dataclasses.replace(request, benchmark=fitting(request.benchmark, _lacking(request.sides)))
    calibrated = [prompt for model in request.sides for prompt in calibration_prompts_of(model.folder)]
    selection = select(request.benchmark, calibrated, request.ids, request.limit, request.overlap)
    request = _without_images(request, selection.items)
    vbench = None if request.vbench is None else check_vbench(request.vbench, engine.device, progress)
    plan = Plan.of(
        request.reference.source, selection.items, request.seeds, request.settings, engine.device, request.memory
    )
    plan = dataclasses.replace(plan, keeps_embeddings=any(has_quantized_text_encoder(s.source) for s in request.sides))
    folder = EvaluationFolder(output)
    labels = [side.label for side in request.sides]
    with folder.claimed(_identity(request, plan, progress)):
        check_space(folder, plan, labels, not configs_of(request.reference.folder))
        with engine.open(output) as crew:
            for number, model in enumerate(request.sides, start=1):
                _evaluate_model(output, plan, model, request, crew, progress)
                record = evaluation_record(folder, plan, request, selection, request.sides[:number])
                _write(output, record)
        _require_videos(record)
        if vbench is not None:  # once the workers have released their GPUs
            record["vbench"] = scored_by_vbench(folder, plan, labels, vbench, progress)
            _write(output, record)
    return record


def _write(output: Path, record: Mapping[str, Any]) -> None:
    write_text(output / EVALUATION, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))


def _evaluate_model(output: Path, plan: Plan, model: Model, request: Request, crew: Crew, progress: Progress) -> None:
    is_reference = model is request.reference
    generating = Generating(output, plan, model, is_reference, outline(model.source))
    generate_missing(generating, crew, progress)
    measuring = Measuring(output, plan, model.label, request.benchmark.name == "tiny")
    measure_missing(measuring, model, request.reference, crew, progress)


def _check_alike(sides: Sequence[Model]) -> None:
    """Raise ModelError unless all models have the same denoisers over the same timesteps."""
    first = sides[0].source.denoisers
    for side in sides:
        if side.source.denoisers != first:
            raise ModelError(
                f"the denoisers of {side.label} run at other timesteps ({_ranges(side)}) than those of "
                f"{sides[0].label} ({_ranges(sides[0])}): they come from different models."
            )


def _ranges(side: Model) -> str:
    """Describe ranges such as "high_noise 900 to 1000, low_noise 0 to 900"."""
    return ", ".join(f"{each.name} {each.timesteps[0]:g} to {each.timesteps[1]:g}" for each in side.source.denoisers)


def _identity(request: Request, plan: Plan, progress: Progress) -> Mapping[str, Any]:
    """Return the facts that two runs into one folder must agree on."""
    models = {
        side.label: {
            "fingerprint": fingerprint(side.source, progress),
            "activation_bits": side.activation_bits or "4",
            **({} if side.speed is None else {"speed": str(side.speed)}),
        }
        for side in request.sides
    }
    return {
        "tempoquant": version("tempoquant"),
        "benchmark": request.benchmark.name,
        "settings": plan.settings.to_dict(),
        "memory": plan.memory,
        "dtype": str(compute_dtype(plan.device)).removeprefix("torch."),
        "reference": request.reference.label,
        "models": models,
        "items": {item.id: [item.image_hash, item.text, *_clip_hashes(item)] for item in plan.items},
    }


def _clip_hashes(item: Item) -> list[str]:
    return [f"{name}: {clip_hash(clip)}" for name, clip in sorted(item.clips.items())]


def _lacking(sides: Sequence[Model]) -> Callable[[Item], str | None]:
    """Return a function that names the input of a model that an item lacks."""
    return lambda item: next((words for side in sides if (words := lacking(side.source, item)) is not None), None)


def _without_images(request: Request, items: Sequence[Item]) -> Request:
    """Return the request without VBench's dimensions that compare with an image, if no item has
    one.

    Raises SettingsError if no dimension is left.
    """
    if request.vbench is None or any(item.image is not None for item in items):
        return request
    vbench = request.vbench.without_images()
    if dropped := [name for name in request.vbench.dimensions if name not in vbench.dimensions]:
        note = f"VBench's {' and '.join(dropped)} compare with a given image, and no item has one: they are left out."
        benchmark = dataclasses.replace(request.benchmark, notes=(*request.benchmark.notes, note))
        request = dataclasses.replace(request, benchmark=benchmark)
    return dataclasses.replace(request, vbench=vbench)


def _require_videos(record: Mapping[str, Any]) -> None:
    """Raise ModelError if a model failed at everything: such a run has not succeeded."""
    for model in record["models"]:
        why = [item["failed"].get(model["label"]) for item in record["items"]]
        if all(why):
            raise ModelError(f"{model['label']} made no video; of the first item it said: {why[0]}")
