"""The figures of an evaluation of the published model, and the missing ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempoquant.errors import EvaluationError
from tempoquant.evaluate.evaluation_folder import SETTINGS
from tempoquant.evaluate.summaries import metric_of
from tempoquant.report.evaluation import Evaluation, read_evaluation


@dataclass(frozen=True)
class Measured:
    """An evaluation, and its rows of the model.

    Attributes:
        evaluation: the whole.
        labels: of the model; several where it was measured in several ways, such as two speeds.
    """

    evaluation: Evaluation
    labels: tuple[str, ...]

    @property
    def document(self) -> Mapping[str, Any]:
        """Return the content of evaluation.json."""
        return self.evaluation.document

    @property
    def models(self) -> list[Mapping[str, Any]]:
        """Return the rows of the model, in the evaluation's order."""
        return [model for model in self.document["models"] if model["label"] in self.labels]


def measured_of(folder: Path, fingerprint: str, name: str) -> Measured:
    """Find a model in an evaluation by the hash of its files: its folder may have been renamed.

    Args:
        folder: what `tempoquant evaluate -o` wrote, or `tempoquant demo`.
        fingerprint: of the model.
        name: what messages call the model.

    Raises:
        EvaluationError: the folder holds no evaluation, or none of this model.
    """
    inner = folder / "evaluation"  # where `demo` puts it
    evaluation = read_evaluation(inner if (inner / "evaluation.json").is_file() else folder)
    file = evaluation.folder / SETTINGS
    try:
        models = json.loads(file.read_text(encoding="utf-8"))["models"]
        labels = tuple(label for label, model in models.items() if model["fingerprint"] == fingerprint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{file} does not say which models were evaluated ({error!r}): evaluate again."
        ) from error
    finished = {model["label"] for model in evaluation.document["models"]} - {evaluation.document["reference"]}
    if not finished.intersection(labels):
        others = " and ".join(sorted(finished)) or "nothing"
        raise EvaluationError(
            f"{folder} measured {others}, and none of these is {name}: give an evaluation of this very model."
        )
    return Measured(evaluation, tuple(label for label in labels if label in finished))


def measured_lines(measured: Measured) -> list[str]:
    """Return a Markdown table of the model's figures with intervals, and how they were measured."""
    document = measured.document
    settings, benchmark = document["settings"], document["benchmark"]
    seeds = len(settings.get("seeds", [])) or 1
    names = list(dict.fromkeys(row["metric"] for row in document["summary"] if row["label"] in measured.labels))
    lines = [
        f"Against `{document['reference']}` on `{benchmark['name']}`: {benchmark['num_items']} items, {seeds} seed(s) "
        f"each, {settings.get('height')}×{settings.get('width')}, {settings['num_frames']} frames, "
        f"{settings.get('num_steps')} steps. In brackets 95 % bootstrap intervals.",
        "",
        f"| | {' | '.join(measured.labels)} |",
        f"|---|{'---|' * len(measured.labels)}",
    ]
    for name in names:
        cells = [_cell(document["summary"], label, name) for label in measured.labels]
        lines.append(f"| {metric_of(name).words} | {' | '.join(cells)} |")
    for title, of in (("seconds a step", _seconds), ("largest memory", _memory)):
        lines.append(f"| {title} | {' | '.join(of(model) for model in measured.models)} |")
    return [*lines, "", f"Measured {_environment(document['environment'])}.", *_notes(document["notes"])]


def not_measured(measured: Measured | None) -> list[str]:
    """Return what the reader of a card would look for and nobody measured, a sentence each."""
    if measured is None:
        return ["Quality, speed and memory: no evaluation of this model was attached."]
    found = []
    if measured.document.get("vbench") is None:
        found.append("VBench's dimensions.")
    if not measured.document["environment"].get("devices"):
        found.append("Speed and memory on a GPU: the evaluation ran on a CPU.")
    if not any(row["metric"].startswith("vmaf") for row in measured.document["summary"]):
        found.append("VMAF.")
    return found


def _cell(summary: Sequence[Mapping[str, Any]], label: str, metric: str) -> str:
    return next((row["words"] for row in summary if (row["label"], row["metric"]) == (label, metric)), "–")


def _seconds(model: Mapping[str, Any]) -> str:
    costs = model.get("costs") or {}
    step, ratio = costs.get("seconds_per_step"), costs.get("seconds_per_step_ratio")
    if not step:
        return "–"
    devices = " and ".join(model.get("devices") or ())
    beside = f", {ratio['median']:.2f} × the reference's" if ratio else ""
    return f"{step['median']:.3f} (median){beside}{f', on {devices}' if devices else ''}"


def _memory(model: Mapping[str, Any]) -> str:
    memory = model.get("memory") or {}
    on_gpu = memory.get("peak_gpu_gib")
    if on_gpu:
        return f"{max(on_gpu.values()):.2f} GiB on the GPU"
    return f"{memory['peak_rss_gib']:.2f} GiB of RAM" if memory.get("peak_rss_gib") else "–"


def _environment(environment: Mapping[str, Any]) -> str:
    versions = [f"{name} {environment[name]}" for name in ("tempoquant", "torch", "diffusers") if environment.get(name)]
    where = " and ".join(environment.get("devices") or [str(environment.get("cpu", "an unknown processor"))])
    date = str(environment.get("date", ""))[:10]
    return f"on {where} with {', '.join(versions)}{f', {date}' if date else ''}"


def _notes(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {note}" for note in notes)] if notes else []
