"""The items of OpenS2V-Eval that calibrate.

The benchmark has 180 items and no others. The published code calibrates on twelve of them and
evaluates all 180, those twelve included. Here the twelve are drawn spread over the categories,
always the same ones, and `evaluate --exclude-overlap` leaves them out for every model: 168 are
evaluated.
"""

import json
import re
from pathlib import Path

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets import Item, load_benchmark


def spread_over_categories(items: tuple[Item, ...], count: int) -> list[Item]:
    """Choose `count` items at even distances in the order of categories and numbers: from each
    category by its size.

    Raises CalibrationError if nothing would be left to evaluate.
    """
    if count >= len(items):
        raise CalibrationError(f"{len(items)} usable items are too few: {count} calibrate, and others are evaluated.")
    ordered = sorted(items, key=lambda item: (item.category or "", _natural(item.id)))
    return [ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count)]


def write_calibration(root: Path, count: int, file: Path) -> list[str]:
    """Write the jsonl for `record --calibration`, with the items' own ids, by which `evaluate`
    recognizes them.

    Returns the ids. Raises CalibrationError if the folder is no OpenS2V-Eval, or has too few usable
    items.
    """
    # Only a benchmark with its images in several aspect ratios uses that number.
    chosen = spread_over_categories(load_benchmark("opens2v", root, aspect_ratio=1.0).items, count)
    lines = [
        json.dumps(
            {"id": item.id, "image": str(Path(str(item.image)).resolve()), "prompt": item.text}, ensure_ascii=False
        )
        for item in chosen
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [item.id for item in chosen]


def _natural(id: str) -> list[tuple[int, str]]:
    """Return a sort key that puts singleobj_9 before singleobj_10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", id)]
