"""Evaluate quantized models beside their reference on a benchmark: everything is kept, and an interrupted run goes on.

The reference comes first, then each model; one pipeline is in memory at a time. evaluation.json is written again after
every model.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tempoquant.errors import ModelError, SettingsError
from tempoquant.evaluate.benchmark_sets import BenchmarkSet, Overlap, select
from tempoquant.evaluate.contents import calibration_prompts_of, configs_of
from tempoquant.evaluate.evaluation_folder import EVALUATION, EvaluationFolder, Take, read_latents
from tempoquant.evaluate.evaluation_record import evaluation_record
from tempoquant.evaluate.files import read_lossless, write_text
from tempoquant.evaluate.generation import LoadedOnDemand, generate_missing
from tempoquant.evaluate.layer_maps import layer_maps
from tempoquant.evaluate.measures import Clip, measures, names_of, take_measures
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.recorded_calls import read_calls
from tempoquant.evaluate.vbench import VBenchSettings, check_vbench
from tempoquant.evaluate.vbench_summary import scored_by_vbench
from tempoquant.integrations.output_folder import fingerprint
from tempoquant.integrations.pipeline_folder import check_pipeline_folder, read_json
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


def evaluate(request: Request, output: Path, device: str | None = None, progress: Progress = SILENT) -> dict[str, Any]:
    """Generate, measure and summarize, going on where an earlier run was interrupted.

    Args:
        output: a folder that is new, empty, or of an earlier run with these settings.
        device: where to run; None for CUDA where there is one, else the CPU.

    Returns:
        What evaluation.json holds.

    Raises:
        CalibrationError: an item was calibrated on, or there is none.
        ModelError: a folder is no such pipeline, or a model made no video at all.
        OutputError: the folder belongs to something else, or cannot be written.
        EvaluationError: VBench was asked for and cannot run, or could score nothing.
    """
    device = device or default_device()
    _check_alike(request.sides)
    vbench = None if request.vbench is None else check_vbench(request.vbench, device, progress)
    calibrated = [prompt for model in request.sides for prompt in calibration_prompts_of(model.folder)]
    selection = select(request.benchmark, calibrated, request.ids, request.limit, request.overlap)
    plan = Plan.of(request.reference.folder, selection.items, request.seeds, request.settings, device)
    folder = EvaluationFolder(output)
    with folder.claimed(_identity(request, plan, progress)):
        for number, model in enumerate(request.sides, start=1):
            _evaluate_model(folder, plan, model, request, progress)
            record = evaluation_record(folder, plan, request, selection, request.sides[:number])
            _write(output, record)
        _require_videos(record)
        if vbench is not None:
            record["vbench"] = scored_by_vbench(folder, plan, [side.label for side in request.sides], vbench, progress)
            _write(output, record)
    return record


def _write(output: Path, record: Mapping[str, Any]) -> None:
    write_text(output / EVALUATION, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))


def _evaluate_model(folder: EvaluationFolder, plan: Plan, model: Model, request: Request, progress: Progress) -> None:
    is_reference = model is request.reference
    pipeline = LoadedOnDemand(model, plan, progress)
    generate_missing(folder, plan, model, pipeline, is_reference and not configs_of(model.folder), progress)
    if not is_reference and not folder.maps(model.label).is_file():
        _map_layers(folder, plan, model, pipeline, progress)
    pipeline.release()
    _measure_missing(folder, plan, model, request, progress)


def _map_layers(
    folder: EvaluationFolder, plan: Plan, model: Model, pipeline: LoadedOnDemand, progress: Progress
) -> None:
    """Where the reference is in 16 bits, so that its calls were kept, and the model has 4-bit linears."""
    files = [folder.calls(take.id, take.seed) for _, take in plan.takes(model.label)]
    calls = [call for file in files if file.is_file() for call in read_calls(file)]
    if calls and configs_of(model.folder):
        maps = layer_maps(pipeline(), plan.reference, calls, plan.bins, progress)
        folder.maps(model.label).parent.mkdir(exist_ok=True)
        write_text(folder.maps(model.label), json.dumps(maps, allow_nan=False))


def _measure_missing(folder: EvaluationFolder, plan: Plan, model: Model, request: Request, progress: Progress) -> None:
    """Measure every video of a model that has not been, against the reference's of the same item and seed."""
    is_reference, settings = model is request.reference, plan.settings
    which = measures(request.benchmark.name == "tiny", settings.height, settings.width)
    finished = {take for take, line in folder.takes().items() if not line.get("failed")}
    measured, wanted = folder.measured(), set(names_of(which, is_reference))
    todo = [
        (item.text, take, take._replace(label=request.reference.label))
        for item, take in plan.takes(model.label)
        if take in finished and not wanted <= measured.get(take, {}).keys()
    ]
    on_measured = progress.start(f"{model.label}: measuring", len(todo))
    for text, take, of_reference in todo:
        if is_reference:
            folder.measure(take, take_measures(which, _clip(folder, plan, text, take), None))
        elif of_reference in finished:
            clips = (_clip(folder, plan, text, each) for each in (take, of_reference))
            folder.measure(take, take_measures(which, *clips))
        on_measured()


def _clip(folder: EvaluationFolder, plan: Plan, text: str, take: Take) -> Clip:
    file, latents = folder.place("lossless", take), read_latents(folder.place("latents", take))
    return Clip(text, read_lossless(file), file, {name: latents[name] for name in plan.bin_names})


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
