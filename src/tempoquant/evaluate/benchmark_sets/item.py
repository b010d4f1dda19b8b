"""One item to generate, and a whole benchmark of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tempoquant.images import open_image
from tempoquant.prompts import Prompt


@dataclass(frozen=True)
class Item:
    """One task of a benchmark. An image file was checked once, and is opened again for use.

    Attributes:
        id: unique within the benchmark.
        text: the prompt.
        image: the first frame, or its file; None for a task of text alone.
        image_hash: as in `Prompt`.
        category: the benchmark's own, if it has any.
        synthetic: whether the benchmark marks the image as synthetic; None if it does not tell.
        clips: as in `Prompt`.
    """

    id: str
    text: str
    image: Path | Image.Image | None
    image_hash: str
    category: str | None = None
    synthetic: bool | None = None
    clips: Mapping[str, Path] = field(default_factory=dict)

    def prompt(self) -> Prompt:
        """Return the prompt with its image in memory. Raises CalibrationError if its file has
        become unreadable.
        """
        image = open_image(self.image, self.id) if isinstance(self.image, Path) else self.image
        return Prompt(self.id, image, self.text, clips=self.clips)


@dataclass(frozen=True)
class Skipped:
    """An entry that is not evaluated."""

    id: str
    why: str


@dataclass(frozen=True)
class BenchmarkSet:
    """The content of a benchmark.

    Attributes:
        name: as the user gave it; a file by its name.
        items: usable ones, in the benchmark's order.
        skipped: the others.
        notes: sentences for readers of the results.
        is_own: whether it is the user's own, who can correct it.
    """

    name: str
    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    is_own: bool = False


def item_of_prompt(prompt: Prompt) -> Item:
    """Return the item of a prompt."""
    return Item(prompt.id, prompt.text, prompt.image, prompt.image_hash, clips=prompt.clips)


def item_of_file(
    id: str, text: str, image: Path | None, category: str | None = None, synthetic: bool | None = None
) -> Item:
    """Return an item whose image was read once and released; None for a task of text alone.

    Raises CalibrationError if the file is missing or unreadable.
    """
    opened = None if image is None else open_image(image, "not usable")
    return Item(id, text, image, Prompt(id, opened, text).image_hash, category, synthetic)
