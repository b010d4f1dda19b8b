"""A folder in OpenS2V-Eval's published format, with images and prompts of our own, and everything
that goes wrong.
"""

import json
from pathlib import Path

from PIL import Image

CATEGORIES = (
    "singleobj", "singlehuman", "singleface", "multiobject", "humanobj", "faceobj", "multiface", "multihuman",
)  # fmt: skip
USABLE = 2 * len(CATEGORIES)
NUM_SEVERAL = 2
BROKEN, MISSING, NO_PROMPT, OUTSIDE, TWICE = "broken_1", "missing_1", "wordless_1", "outside_1", "singleobj_1"
SPELLINGS = {"True": True, "wrong": False, "Wrong": False, " TRUE ": True, "unknown": None}


def write_tree(root: Path) -> Path:
    """Write two usable items of each category, and five entries to skip."""
    records = []
    spellings = list(SPELLINGS)
    for index, category in enumerate(CATEGORIES):
        for number in (1, 2):
            place = f"Images/{category}/thing/{number}.{'png' if number == 1 else 'jpg'}"
            _write_image(root / place, (30 * index, 100 * number, 80))
            paths = [place, "Images/not/there.png"] if index < NUM_SEVERAL and number == 2 else [place]
            text = f"The thing number {number} of {category} turns slowly."
            records.append(_record(f"{category}_{number}", paths, text, spellings[index % len(spellings)]))
    (root / "Images" / "broken.png").write_bytes((root / "Images/singleobj/thing/1.png").read_bytes()[:40])
    records += [
        _record(BROKEN, ["Images/broken.png"], "A picture that ends too early."),
        _record(MISSING, ["Images/singleobj/thing/9.png"], "A picture that nobody sent."),
        _record(NO_PROMPT, ["Images/singleobj/thing/1.png"], " "),
        _record(OUTSIDE, ["../secret.png"], "A picture of somebody else's."),
        _record(TWICE, ["Images/singleobj/thing/2.jpg"], "The same id with another prompt."),
    ]
    # An object with a key twice, which json.dumps of a dict cannot write.
    text = "{" + ",\n".join(f"{json.dumps(id)}: {json.dumps(record)}" for id, record in records) + "}"
    (root / "Open-Domain_Eval.json").write_text(text, encoding="utf-8")
    human = [pair for pair in records if pair[0].startswith(("singlehuman", "singleface"))]
    (root / "Human-Domain_Eval.json").write_text(json.dumps(dict(human)), encoding="utf-8")
    return root


def _record(id: str, paths: list[str], text: str, flag: str = "wrong") -> tuple[str, dict[str, object]]:
    return id, {"img_paths": paths, "prompt": text, "synthesis_flag": flag, "class_label": ["thing"] * len(paths)}


def _write_image(file: Path, color: tuple[int, int, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (48, 40), color)
    picture.paste((255, 255, 255), (10, 10, 20, 20))
    picture.save(file)
