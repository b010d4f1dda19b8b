"""Prompts that bring what a pipeline needs: an image, clips of a pose and a face, or the text
alone.
"""

import json
from pathlib import Path

from PIL import Image

from tempoquant.models.source import SourceModel
from tempoquant.prompts import Prompt, load_prompts

NUM_FRAMES = 5
TEXTS = ("a cat", "a dog walks", "a bird in the rain")


def write_prompts(folder: Path, brings: tuple[str, ...]) -> Path:
    """Write a jsonl of three prompts with these inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, text in enumerate(TEXTS):
        line = {"id": f"prompt-{number}", "prompt": text}
        for name in brings:
            place = folder / f"{name}-{number}"
            if name == "image":
                place = place.with_suffix(".png")
                Image.new("RGB", (64, 48), (80 * number, 100, 50)).save(place)
            else:
                place.mkdir(exist_ok=True)
                for frame in range(NUM_FRAMES):
                    Image.new("RGB", (64, 48), (50 * frame, 40 * number, 200)).save(place / f"{frame}.png")
            line[name] = place.name
        lines.append(json.dumps(line))
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines))
    return file


def prompts_for(source: SourceModel, folder: Path) -> list[Prompt]:
    """Write the same for a pipeline; with an image for one that takes it, needed or not."""
    takes = ("image",) if source.family.takes_image(source.index) else ()
    return load_prompts(write_prompts(folder, source.family.needs(source.index) or takes))
