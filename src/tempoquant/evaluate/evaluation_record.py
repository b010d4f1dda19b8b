"""evaluation.json: the whole result of an evaluation, for programs and for the report."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tempoquant.evaluate import cost_summaries
from tempoquant.evaluate.benchmark_sets import Selection
from tempoquant.evaluate.environment import environment
from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.metrics import measures
from tempoquant.evaluate.plan import Model, Plan
from tempoquant.evaluate.request import Request
from tempoquant.evaluate.summaries import pairs, summarize
from tempoquant.hosts.contents import bits_per_weight, configs_of
from tempoquant.models.pipeline_folder import read_json

SCHEMA = 1

Lines = Mapping[Take, Mapping[str, Any]]


def evaluation_record(
    folder: EvaluationFolder, plan: Plan, request: Request, selection: Selection, sides: Sequence[Model]
) -> dict[str, Any]:
    """Return plain values for JSON. Paths are relative to the folder.

    Args:
        sides: models that are evaluated already, the reference first.
    """
    labels = [side.label for side in sides]
    wanted = {take for label in labels for _, take in plan.takes(label)}
    lines = {take: line for take, line in folder.takes().items() if take in wanted}
    measured = {take: metrics for take, metrics in folder.measured().items() if take in wanted}
    settings, benchmark = plan.settings, request.benchmark
    return {
        "schema": SCHEMA,
        "benchmark": {
            "name": benchmark.name,
            "num_items": len(plan.items),
            "skipped": [{"id": skip.id, "why": skip.why} for skip in benchmark.skipped],
            "overlap": list(selection.overlap),
            "excluded_overlap": list(selection.excluded),
        },
        "settings": {
            **{
                name: getattr(settings, name)
                for name in ("height", "width", "num_frames", "num_steps", "flow_shift", "guidance_scale", "fps")
            },
            "seeds": list(plan.seeds),
            "memory": plan.memory,
        },
        "environment": environment(),
        "command": request.command,
        "reference": request.reference.label,
        "models": [_model(folder, plan, side, lines, labels[0]) for side in sides],
        "items": _items(folder, plan, labels, lines, measured),
        "summary": summarize(measured, labels, plan.bin_names),
        "pairs": pairs(measured, labels, plan.bin_names),
        "notes": [
            *measures.notes(settings.height, settings.width),
            *cost_summaries.notes(plan.device),
            *benchmark.notes,
            *_warnings(selection),
            *_speeds(sides),
        ],
        "vbench": None,
    }


def _model(folder: EvaluationFolder, plan: Plan, side: Model, lines: Lines, reference: str) -> dict[str, Any]:
    configs = configs_of(side.folder)
    costs = [line for take, line in lines.items() if take.label == side.label and not line.get("failed")]
    seconds = [line["seconds_per_step"] for line in costs if line["seconds_per_step"] is not None]
    first = next(iter(configs.values()), None)
    calibration = None if first is None or first.calibration is None else first.calibration
    maps = folder.maps(side.label)
    return {
        "label": side.label,
        "folder": str(side.folder),
        "recipe": None if first is None else first.recipe.to_dict(),
        "bits_per_weight": bits_per_weight(configs.values()) if configs else side.source.bits_per_weight,
        "num_bytes": side.source.weight_bytes,
        "activation_bits": (side.activation_bits or "4") if configs else None,
        "speed": None if side.speed is None else str(side.speed),
        "acceleration": costs[-1].get("acceleration") if costs else None,
        "calibration": None
        if calibration is None
        else {
            "num_prompts": len(calibration.prompts),
            "prompts": [{"id": prompt["id"], "prompt": prompt["prompt"]} for prompt in calibration.prompts],
            "settings": dict(calibration.settings),
        },
        "kernels": costs[0].get("kernels", {}) if costs else {},
        "devices": dict(Counter(line["device"] for line in costs if "device" in line)),
        "memory": _memory(costs),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "costs": cost_summaries.costs_of(lines, side.label, reference),
        "maps": read_json(maps) if maps.is_file() else None,
    }


def _memory(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the largest of all videos."""
    rss = [line["peak_rss_gib"] for line in costs if line["peak_rss_gib"] is not None]
    on_gpu: dict[str, float] = {}
    for line in costs:
        for phase, gib in (line["peak_gpu_gib"] or {}).items():
            on_gpu[phase] = max(gib, on_gpu.get(phase, 0.0))
    return {"peak_rss_gib": max(rss) if rss else None, "peak_gpu_gib": on_gpu or None}


def _items(
    folder: EvaluationFolder, plan: Plan, labels: Sequence[str], lines: Lines, measured: Lines
) -> list[dict[str, Any]]:
    found = []
    for item in plan.items:
        for seed in plan.seeds:
            takes = {label: Take(label, item.id, seed) for label in labels}
            ended = {label: lines[take] for label, take in takes.items() if take in lines}
            image = folder.image(item.id)
            found.append(
                {
                    "id": item.id,
                    "seed": seed,
                    "category": item.category,
                    "synthetic": item.synthetic,
                    "prompt": item.text,
                    "image": _relative(image, folder.path) if image.is_file() else None,
                    "videos": {
                        label: _relative(folder.place("videos", takes[label]), folder.path)
                        for label, line in ended.items()
                        if not line.get("failed")
                    },
                    "metrics": {label: measured[take] for label, take in takes.items() if take in measured},
                    "failed": {label: line["failed"] for label, line in ended.items() if line.get("failed")},
                }
            )
    return found


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _warnings(selection: Selection) -> list[str]:
    if not selection.overlap:
        return []
    return [
        f"{len(selection.overlap)} of {len(selection.items)} items were calibrated on (--allow-overlap): the results "
        "are better than on items no model has seen."
    ]


def _speeds(sides: Sequence[Model]) -> list[str]:
    return [
        f"{side.label} generates at another speed ({side.speed}): its numbers are not those of quantized weights and "
        "activations alone."
        for side in sides
        if side.speed is not None
    ]
