"""VBench-I2V: a JSON list of {"prompt_en", "dimension", "image_type"[, "image_name"]} beside its
images.

An entry without image_name asks for a motion of the camera: its image is the one whose prompt it
extends by ", camera …". Source: Vchitect/VBench, vbench2_beta_i2v; the images come in four aspect
ratios, data/crop/<ratio>.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets.item import BenchmarkSet, Item, Skipped, item_of_file

INFO = "vbench2_i2v_full_info.json"
ASPECT_RATIOS = {"1-1": 1.0, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}


def load_vbench_i2v(root: Path, aspect_ratio: float, with_images: bool = True) -> BenchmarkSet:
    """Load every entry of the info file in a folder (or of the given file), with the images of the
    nearest crop.

    Args:
        root: VBench's own list of texts, VBench_full_info.json, is such a file too, without images.
        aspect_ratio: of the videos, width / height.
        with_images: False for the prompts alone; images are then not needed.

    Raises:
        CalibrationError: there is no info file, or it is not of this format.
    """
    file = root if root.is_file() else root / INFO
    folder = root.parent if root.is_file() else root
    entries = _read(file)
    ratio = min(ASPECT_RATIOS, key=lambda name: abs(math.log(ASPECT_RATIOS[name] / aspect_ratio)))
    crops = [f"{above}{ratio}" for above in ("data/crop/", "crop/", "")]
    places = [folder / name for name in (*crops, "data/origin", "origin", "images", ".") if (folder / name).is_dir()]
    items, skipped = [], []
    known: dict[tuple[str, str], str] = {}
    for number, entry in enumerate(entries):
        id = f"vbench-i2v-{number:04d}"
        try:
            item = _item(places if with_images else None, id, entry)
        except CalibrationError as error:
            skipped.append(Skipped(id, str(error)))
            continue
        first = known.setdefault((item.image_hash, item.text), id)
        if first == id:
            items.append(item)
        else:
            skipped.append(Skipped(id, f"it has the {'image and ' if with_images else ''}prompt of {first}."))
    note = f"VBench-I2V's images are those of aspect ratio {ratio} if there are such."
    if not with_images:
        note = "VBench's prompts are used without images."
    return BenchmarkSet("vbench-i2v", tuple(items), tuple(skipped), (note,))


def _read(file: Path) -> list[Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise CalibrationError(f"there is no {file}: give the folder of VBench-I2V that has {INFO} in it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{file} cannot be read as JSON ({error}).") from error
    if not isinstance(entries, list):
        raise CalibrationError(f"{file} is not a list: give VBench-I2V's own {INFO}.")
    return entries


def _item(places: list[Path] | None, id: str, entry: Any) -> Item:
    """Make an item of an entry. Raises CalibrationError for an entry without a prompt, or without
    an image in `places`, unless that is None.
    """
    text = entry.get("prompt_en") if isinstance(entry, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError("it has no prompt_en.")
    category = entry.get("image_type")
    if places is None:
        return item_of_file(id, text, None, category if isinstance(category, str) else None)
    name = entry.get("image_name") or f"{text.partition(', camera ')[0]}.jpg"
    if not isinstance(name, str) or Path(name).name != name:
        raise CalibrationError(f"its image {name} could lie outside the folder: refused.")
    image = next((place / name for place in places if (place / name).is_file()), None)
    if image is None:
        raise CalibrationError(f"there is no image {name}.")
    return item_of_file(id, text, image, category if isinstance(category, str) else None)
