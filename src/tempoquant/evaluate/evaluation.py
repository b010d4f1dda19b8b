"""Evaluate quantized models beside their reference on a benchmark: everything is kept, and an interrupted run goes on.

The reference comes first, then each model; a worker has one pipeline in memory at a time. evaluation.json is written
again after every model.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tempoquant.engines import Crew, Engine, Local
from tempoquant.errors import ModelError, SettingsError
from tempoquant.evaluate.benchmark_sets import BenchmarkSet, Overlap, select
from tempoquant.evaluate.contents import calibration_prompts_of, configs_of
from tempoquant.evaluate.disk_space import check_space
from tempoquant.evaluate.evaluation_folder import EVALUATION, EvaluationFolder
from tempoquant.evaluate.evaluation_record import evaluation_record
from tempoquant.evaluate.files import write_text
from tempoquant.evaluate.generation import Generating, generate_missing
from tempoquant.evaluate.measuring import Measuring, measure_missing
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.vbench import VBenchSettings, check_vbench
from tempoquant.evaluate.vbench_summary import scored_by_vbench
from tempoquant.integrations.output_folder import fingerprint, outline
from tempoquant.integrations.pipeline_folder import check_pipeline_folder, read_json
from tempoquant.integrations.residency import Memory
from tempoquant.integrations.sampling import SamplingSettings
from tempoquant.integrations.wan import compute_dtype, default_device
from tempoquant.progress import SILENT, Progress


@dataclass(frozen=True)
class Request:
    """What is evaluated, and on what.

    Attributes:
        reference: what the models were quantized from.
        models: the others, labels unique.
        benchmark: where items come from.
        settings: of every generation; flow_shift is a number.
        seeds: every item is generated with each.
        ids, limit, overlap: see `benchmark_sets.select`.
        command: what the user typed, for the record.
        memory: the memory mode of every pipeline, the reference's as well: modes tile the autoencoder.
        vbench: how to score the videos with VBench too; None for not at all.
    """

    reference: Model
    models: Sequence[Model]
    benchmark: BenchmarkSet
    settings: SamplingSettings
    seeds: Sequence[int] = (0,)
    ids: Sequence[str] | None = None
    limit: int | None = None
    overlap: Overlap = Overlap.REFUSE
    command: str = ""
    memory: Memory = "resident"
    vbench: VBenchSettings | None = None

    def __post_init__(self) -> None:
        if self.settings.flow_shift is None:
            raise SettingsError("the flow shift has to be the same for every model: give one with --flow-shift.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise SettingsError(f"seeds are one or more different whole numbers, not {list(self.seeds)}.")

    @property
    def sides(self) -> list[Model]:
        """The reference, then the models."""
        return [self.reference, *self.models]


def evaluate(
    request: Request, output: Path, engine: Engine | None = None, progress: Progress = SILENT
) -> dict[str, Any]:
    """Generate, measure and summarize, going on where an earlier run was interrupted.

    Args:
        output: a folder that is new, empty, or of an earlier run with these settings.
        engine: where to run; None for CUDA where there is one, else the CPU, in this process.

    Returns:
        What evaluation.json holds.

    Raises:
        CalibrationError: an item was calibrated on, or there is none.
        ModelError: a folder is no such pipeline, or a model made no video at all.
        OutputError: the folder belongs to something else, cannot be written, or its disk has no room for what is
            missing.
        TempoQuantError: the engine has no worker left.
        EvaluationError: VBench was asked for and cannot run, or could score nothing.
    """
    engine, output = engine or Local((default_device(),)), output.resolve()
    _check_alike(request.sides)
    vbench = None if request.vbench is None else check_vbench(request.vbench, engine.device, progress)
    calibrated = [prompt for model in request.sides for prompt in calibration_prompts_of(model.folder)]
    selection = select(request.benchmark, calibrated, request.ids, request.limit, request.overlap)
    plan = Plan.of(
        request.reference.folder, selection.items, request.seeds, request.settings, engine.device, request.memory
    )
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
        if vbench is not None:  # once the workers have given their GPUs back
            record["vbench"] = scored_by_vbench(folder, plan, labels, vbench, progress)
            _write(output, record)
    return record


def _write(output: Path, record: Mapping[str, Any]) -> None:
    write_text(output / EVALUATION, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))


def _evaluate_model(output: Path, plan: Plan, model: Model, request: Request, crew: Crew, progress: Progress) -> None:
    # Where workers run, relative paths may mean something else.
    resolved = dataclasses.replace(model, folder=model.folder.resolve())
    is_reference = model is request.reference
    generating = Generating(output, plan, resolved, is_reference, outline(resolved.folder))
    generate_missing(generating, crew, progress)
    measuring = Measuring(output, plan, model.label, request.benchmark.name == "tiny")
    measure_missing(measuring, model, request.reference, crew, progress)


def _check_alike(sides: Sequence[Model]) -> None:
    """Raise ModelError unless all models hand over from one expert to the other at the same timestep."""
    for side in sides:
        check_pipeline_folder(side.folder)
    ratios = {side.label: read_json(side.folder / "model_index.json")["boundary_ratio"] for side in sides}
    if len(set(ratios.values())) > 1:
        raise ModelError(f"the models have different boundary ratios ({ratios}): they come from different models.")


def _identity(request: Request, plan: Plan, progress: Progress) -> Mapping[str, Any]:
    """What two runs into one folder have to agree on."""
    models = {
        side.label: {"fingerprint": fingerprint(side.folder, progress), "activation_bits": side.activation_bits or "4"}
        for side in request.sides
    }
    return {
        "tempoquant": version("tempoquant"),
        "benchmark": request.benchmark.name,
        "settings": dataclasses.asdict(plan.settings),
        "memory": plan.memory,
        "dtype": str(compute_dtype(plan.device)).removeprefix("torch."),
        "reference": request.reference.label,
        "models": models,
        "items": {item.id: [item.image_hash, item.text] for item in plan.items},
    }


def _require_videos(record: Mapping[str, Any]) -> None:
    """Raise ModelError where a model failed at everything: such a run has not succeeded."""
    for model in record["models"]:
        why = [item["failed"].get(model["label"]) for item in record["items"]]
        if all(why):
            raise ModelError(f"{model['label']} made no video; of the first item it said: {why[0]}")
