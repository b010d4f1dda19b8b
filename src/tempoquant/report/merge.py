"""Merging of evaluations: those of the same 16-bit videos become one part, the others stay
apart.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempoquant.report.evaluation import Evaluation
from tempoquant.report.metrics import flat_metrics


@dataclass
class Item:
    """One prompt with one seed.

    Attributes:
        id, seed, category, prompt: as the evaluation has them.
        overlap: whether a model was also calibrated on it, and it was kept on request.
        image: the given first frame; None if it is unknown.
        videos, metrics, failed: by label; a failed one has no video.
    """

    id: str
    seed: int
    category: str | None
    prompt: str
    overlap: bool
    image: Path | None
    videos: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Part:
    """One part of the page: one benchmark, one reference, all models that were compared with it.

    Attributes:
        benchmark, settings: as in the evaluations, which agree.
        labels: the reference first. Unique: a label that another folder used already gets its
            folder's name added.
        models: as the evaluations have them, by label.
        items: in the order of the first evaluation.
        summary, pairs: rows of all evaluations; pairs are of two quantized models of one
            evaluation.
        commands: each with the labels it measured.
        environments: each with its folder.
        notes: without repetitions.
        overlap, excluded, skipped: of all evaluations.
        vbench: VBench's scores by label, with the versions that made them; empty if VBench did not
            run.
        vbench_summary: rows like those of the summary.
    """

    benchmark: Mapping[str, Any]
    settings: Mapping[str, Any]
    labels: list[str]
    models: dict[str, Mapping[str, Any]]
    items: list[Item]
    summary: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    commands: list[tuple[str, list[str]]]
    environments: list[tuple[str, Mapping[str, Any]]]
    notes: list[str]
    overlap: list[str]
    excluded: list[str]
    skipped: list[Any]
    vbench: dict[str, Any]
    vbench_summary: list[dict[str, Any]]

    @property
    def reference(self) -> str:
        """Return the label of the 16-bit model."""
        return self.labels[0]

    @property
    def others(self) -> list[str]:
        """Return the labels of the models that are compared with it."""
        return self.labels[1:]


def merge(evaluations: Sequence[Evaluation]) -> list[Part]:
    """Merge evaluations whose benchmark, settings, prompts and 16-bit videos are the same, byte for
    byte.

    Only then was each 4-bit video compared with the same reference. Raises EvaluationError if a
    media file is missing.
    """
    parts: dict[str, Part] = {}
    for evaluation in evaluations:
        key = _what_was_asked(evaluation)
        if key in parts:
            _add(parts[key], evaluation)
        else:
            parts[key] = _part_of(evaluation)
    return list(parts.values())


def _what_was_asked(evaluation: Evaluation) -> str:
    document = evaluation.document
    reference = document["reference"]
    items = []
    for item in document["items"]:
        video = item["videos"].get(reference)
        pixels = hashlib.sha256(evaluation.file(video).read_bytes()).hexdigest() if video else None
        items.append((item["id"], item["seed"], item["prompt"], pixels))
    asked = [document["benchmark"]["name"], document["settings"], reference, sorted(items, key=str)]
    return json.dumps(asked, sort_keys=True)


def _part_of(evaluation: Evaluation) -> Part:
    document = evaluation.document
    names = {label: label for label in evaluation.labels}
    part = Part(
        benchmark=document["benchmark"],
        settings=document["settings"],
        labels=evaluation.labels,
        models={},
        items=[_new_item(item, evaluation) for item in document["items"]],
        summary=[],
        pairs=[],
        commands=[],
        environments=[],
        notes=[],
        overlap=[],
        excluded=[],
        skipped=list(document["benchmark"]["skipped"]),
        vbench={},
        vbench_summary=[],
    )
    _take(part, evaluation, names)
    return part


def _add(part: Part, evaluation: Evaluation) -> None:
    """Add the 4-bit models of an evaluation; its reference is already in the part."""
    names = {}
    for label in evaluation.labels[1:]:
        names[label] = next(name for name in _names(label, evaluation.folder) if name not in part.labels)
        part.labels.append(names[label])
    _take(part, evaluation, names)


def _names(label: str, folder: Path) -> Iterator[str]:
    yield label
    yield f"{label} ({folder.resolve().name})"
    number = 2
    while True:
        yield f"{label} ({folder.resolve().name} {number})"
        number += 1


def _take(part: Part, evaluation: Evaluation, names: Mapping[str, str]) -> None:
    """Add everything that belongs to the labels in `names`, under their new names."""
    document = evaluation.document
    part.models |= {names[m["label"]]: m for m in document["models"] if m["label"] in names}
    part.summary += [{**row, "label": names[row["label"]]} for row in document["summary"] if row["label"] in names]
    part.pairs += [
        {**row, "first": names[row["first"]], "second": names[row["second"]]} for row in document.get("pairs") or []
    ]
    part.commands.append((document["command"], list(names.values())))
    part.environments.append((str(evaluation.folder), document["environment"]))
    part.notes += [note for note in document["notes"] if note not in part.notes]
    overlap = document["benchmark"]["overlap"]
    part.overlap += [item for item in overlap if item not in part.overlap]
    part.excluded += [item for item in document["benchmark"]["excluded_overlap"] if item not in part.excluded]
    if document.get("vbench"):
        _take_vbench(part, document["vbench"], names)
    items = {(item.id, item.seed): item for item in part.items}
    for found in document["items"]:
        item = items[found["id"], found["seed"]]
        item.overlap |= item.id in overlap
        for label, name in names.items():
            if label in found["videos"]:
                item.videos[name] = evaluation.file(found["videos"][label])
            if label in found["metrics"]:
                item.metrics[name] = flat_metrics(found["metrics"][label])
            if label in found["failed"]:
                item.failed[name] = str(found["failed"][label])


def _take_vbench(part: Part, found: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Add VBench's scores; scores of other dimensions, or by other weights, come with a warning."""
    made_by = {"version": found["version"], "dimensions": found["dimensions"], "weights": found.get("weights") or []}
    first = next(iter(part.vbench.items()), None)
    scores = {names[label]: {**score, "made_by": made_by} for label, score in found["models"].items() if label in names}
    if first is not None and first[1]["made_by"] != made_by:
        part.notes.append(
            f"VBench scored {', '.join(scores)} with another version, other weights or other dimensions than "
            f"{first[0]}: their VBench means do not compare."
        )
    part.vbench |= scores
    part.vbench_summary += [{**row, "label": names[row["label"]]} for row in found["summary"] if row["label"] in names]
    for failure in found.get("failed") or []:
        note = f"VBench's {failure['dimension'].replace('_', ' ')} failed: {failure['why']}"
        if failure.get("label") is None or failure["label"] in names:
            part.notes += [note] if note not in part.notes else []


def _new_item(item: Mapping[str, Any], evaluation: Evaluation) -> Item:
    image = item.get("image")
    return Item(
        item["id"], item["seed"], item.get("category"), item["prompt"], False, evaluation.file(image) if image else None
    )
