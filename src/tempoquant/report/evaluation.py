"""Reading of evaluation.json, which `tempoquant evaluate` writes, and its checks before use."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from tempoquant.errors import EvaluationError

FILE_NAME = "evaluation.json"
SCHEMA = 1

_NUMBER = (int, float)
_SHAPE: dict[str, Any] = {
    "schema": int,
    "benchmark": {"name": str, "num_items": int, "skipped": list, "overlap": [str], "excluded_overlap": [str]},
    "settings": {"fps": _NUMBER, "num_frames": int},
    "environment": dict,
    "command": str,
    "reference": str,
    "models": [{"label": str, "folder": str}],
    "items": [{"id": str, "seed": int, "prompt": str, "videos": dict, "metrics": dict, "failed": dict}],
    "summary": [{"label": str, "metric": str, "words": str}],
    "notes": [str],
}
"""The keys that a page needs: names to a type, an object, or a list of one of them. More keys are
allowed.
"""

_VBENCH: dict[str, Any] = {
    "version": str,
    "dimensions": [str],
    "models": dict,
    "summary": [{"label": str, "metric": str, "words": str}],
}
"""The same for its key `vbench`, which may be null."""

_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", _NUMBER: "a number"}


@dataclass(frozen=True)
class Evaluation:
    """One folder that `tempoquant evaluate` wrote.

    Attributes:
        folder: its location; the paths in `document` are relative to it.
        document: evaluation.json, checked.
    """

    folder: Path
    document: Mapping[str, Any]

    @property
    def labels(self) -> list[str]:
        """Return the labels: the reference's first, then those of the other models in their
        order.
        """
        reference = self.document["reference"]
        others = [model["label"] for model in self.document["models"] if model["label"] != reference]
        return [reference, *others]

    def file(self, name: str) -> Path:
        """Return a media file that the document names. Raises EvaluationError if it is missing, or
        outside the folder.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise EvaluationError(f"{self.folder / FILE_NAME} names {name}, which is outside its folder: refused.")
        if not (self.folder / path).is_file():
            raise EvaluationError(
                f"{self.folder / FILE_NAME} names {name}, which is not there: run its `tempoquant evaluate` again, "
                "which makes the missing files."
            )
        return self.folder / path


def read_evaluation(folder: Path) -> Evaluation:
    """Read and check one folder.

    Raises:
        EvaluationError: there is no evaluation.json, or it is not JSON, has another schema, lacks a
            key that a page needs, or contradicts itself. `Evaluation.file` checks media files
            later.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        raise EvaluationError(f"{folder} holds no {FILE_NAME}: give a folder that `tempoquant evaluate -o` wrote.")
    try:
        document = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} is not JSON ({error}): run its `tempoquant evaluate` again.") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise EvaluationError(
            f"{file} has schema {schema}, and this version reads {SCHEMA}: use the version that wrote it."
        )
    _check_shape(document, _SHAPE, file, "")
    if document.get("vbench") is not None:
        _check_shape(document["vbench"], _VBENCH, file, "vbench")
    _check_meaning(document, file)
    return Evaluation(folder, document)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _check_shape(value: Any, shape: Any, file: Path, where: str) -> None:
    kind = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    if not isinstance(value, kind) or isinstance(value, bool):
        raise EvaluationError(f"{file}: {where or 'the whole'} should be {_NAMES[kind]}, not {str(value)[:60]!r}.")
    if isinstance(shape, dict):
        for key, inner in shape.items():
            if key not in value:
                raise EvaluationError(f"{file} lacks {f'{where}.{key}'.lstrip('.')}: was it written by hand?")
            _check_shape(value[key], inner, file, f"{where}.{key}".lstrip("."))
    elif isinstance(shape, list):
        for number, item in enumerate(value):
            _check_shape(item, shape[0], file, f"{where}[{number}]")


def _check_meaning(document: Mapping[str, Any], file: Path) -> None:
    """Check that the parts agree with each other."""
    labels = [model["label"] for model in document["models"]]
    _refuse(len(set(labels)) != len(labels), f"{file}: two models have one label: {sorted(labels)}.")
    _refuse(document["reference"] not in labels, f"{file}: the reference {document['reference']!r} is no model of it.")
    _refuse(not 0 < document["settings"]["fps"] < 1000, f"{file}: {document['settings']['fps']} is no frame rate.")
    _refuse(document["settings"]["num_frames"] < 1, f"{file}: videos of no frame cannot be shown.")
    keys = [(item["id"], item["seed"]) for item in document["items"]]
    _refuse(len(set(keys)) != len(keys), f"{file}: an item occurs twice with the same seed.")
    for where, used in _used_labels(document):
        _refuse(used not in labels, f"{file}: {where} names {used!r}, which is none of the models {labels}.")
    for model in document["models"]:
        for denoiser, heat in (model.get("maps") or {}).items():
            _check_map(heat, f"{file}: the map of {model['label']!r}, {denoiser},")


def _used_labels(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for item in document["items"]:
        for part in ("videos", "metrics", "failed"):
            yield from ((f"item {item['id']!r}", label) for label in item[part])
    yield from (("the summary", row["label"]) for row in document["summary"])
    vbench = document.get("vbench") or {"models": {}, "summary": []}
    yield from (("VBench", label) for label in [*vbench["models"], *(row["label"] for row in vbench["summary"])])
    yield from (("a pair", row.get(side)) for row in document.get("pairs") or [] for side in ("first", "second"))


def _check_map(heat: Any, where: str) -> None:
    parts = ("layers", "bins", "error_db", "clip_ratio")
    _refuse(not isinstance(heat, dict) or any(part not in heat for part in parts), f"{where} lacks one of {parts}.")
    shape = (len(heat["layers"]), len(heat["bins"]))
    for part in ("error_db", "clip_ratio"):
        rows = heat[part]
        if rows is None:
            continue
        _refuse(
            len(rows) != shape[0] or any(len(row) != shape[1] for row in rows),
            f"{where} has {shape[0]} layers and {shape[1]} bins, but its {part} is of another shape.",
        )
        numbers = [number for row in rows for number in row if number is not None]
        finite = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        _refuse(not finite, f"{where} holds something in {part} that is no number.")


def _refuse(wrong: bool, sentence: str) -> None:
    if wrong:
        raise EvaluationError(sentence)
