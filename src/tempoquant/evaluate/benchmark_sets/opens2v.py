"""OpenS2V-Eval: JSON files of {id: {"img_paths", "prompt", "synthesis_flag", "class_label"}} beside
a folder Images.

It is a benchmark for subject-to-video. For image-to-video the first image of an item becomes the
first frame, for text-to-video its images are ignored; the prompt is taken as it is. Source:
PKU-YuanGroup/OpenS2V-Nexus; neither images nor prompts are part of this package.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets.item import BenchmarkSet, Item, Skipped, item_of_file

SUFFIX = "_Eval.json"
LARGEST = "Open-Domain_Eval.json"
"""The file with all items; the other files repeat some."""
NOTE = (
    "OpenS2V-Eval is made for subject-to-video: many of its images are cut-outs, which no video begins with. "
    "Differences between models on the same items mean something; absolute scores do not compare with other benchmarks."
)
NOTE_OF_TEXTS = "OpenS2V-Eval is made for subject-to-video: here its prompts are used without their images."

Records = dict[str, tuple[str, Mapping[str, Any]]]


def load_opens2v(root: Path, with_images: bool = True) -> BenchmarkSet:
    """Load every item of the benchmark's JSON files in a folder (or of the given file).

    Items whose image is missing or broken, and repeated ids, are skipped with the reason.

    Args:
        with_images: False for the prompts alone; images are then not needed.

    Raises:
        CalibrationError: there is no such file, or it is not of this format.
    """
    files = [root] if root.is_file() else sorted(root.glob(f"*{SUFFIX}"), key=lambda file: (file.name != LARGEST, file))
    folder = root.parent if root.is_file() else root
    if not files:
        raise CalibrationError(f"{root} holds no *{SUFFIX}: give the folder of OpenS2V-Eval that has Images in it.")
    records: Records = {}
    skipped = [skip for file in files for skip in _merge(file, records)]
    items, num_several = [], 0
    for id, (_, record) in records.items():
        try:
            items.append(_item(folder, id, record, with_images))
            num_several += with_images and len(record["img_paths"]) > 1
        except CalibrationError as error:
            skipped.append(Skipped(id, str(error)))
    notes = [NOTE if with_images else NOTE_OF_TEXTS]
    if num_several:
        notes.append(f"{num_several} items have several reference images: the first is the first frame.")
    return BenchmarkSet("opens2v", tuple(items), tuple(skipped), tuple(notes))


def _merge(file: Path, records: Records) -> list[Skipped]:
    """Add the records of a file to those of earlier files; return rejected records, except plain
    repetitions of another file.
    """
    skipped, here = [], set()
    for id, record in _read(file):
        known_file, known = records.get(id, ("", None))
        if id in here:
            skipped.append(Skipped(id, f"the id occurs twice in {file.name}: the first one counts."))
        elif known is None:
            records[id] = (file.name, record)
        elif known != record:
            skipped.append(Skipped(id, f"{file.name} differs from {known_file} in this entry; the latter counts."))
        here.add(id)
    return skipped


def _read(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Read (id, record) in order, with repeated ids, which plain JSON readers drop silently."""
    try:
        # Objects become tuples of pairs, arrays stay lists.
        pairs = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(pairs, tuple) or not all(isinstance(record, tuple) for _, record in pairs):
        raise CalibrationError(f"{file} is not an object of id to record: give OpenS2V-Eval's own JSON.")
    return [(id, dict(record)) for id, record in pairs]


def _item(folder: Path, id: str, record: Mapping[str, Any], with_image: bool) -> Item:
    paths, text = record.get("img_paths"), record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError("it has no prompt.")
    category = id.rpartition("_")[0] or None
    if not with_image:
        return item_of_file(id, text, None, category)
    if not isinstance(paths, list) or not paths or not isinstance(paths[0], str):
        raise CalibrationError("it names no image.")
    place = PurePosixPath(paths[0])
    if place.is_absolute() or ".." in place.parts:
        raise CalibrationError(f"its image {paths[0]} could lie outside the folder: refused.")
    return item_of_file(id, text, folder / place, category, _is_synthetic(record))


def _is_synthetic(record: Mapping[str, Any]) -> bool | None:
    """Return whether the record is synthetic; the published files spell it "True", "wrong" and
    "Wrong".
    """
    return {"true": True, "wrong": False, "false": False}.get(str(record.get("synthesis_flag")).strip().lower())
