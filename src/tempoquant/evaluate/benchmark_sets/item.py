"""One thing to generate, and a whole benchmark of them."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tempoquant.images import open_image
from tempoquant.prompts import Prompt


@dataclass(frozen=True)
class Item:
    """One task of a benchmark; its image, if it is a file, was found readable and is opened again when it is needed.

    Attributes:
        id: unique within the benchmark.
        text: the prompt.
        image: the first frame, or its file.
        image_hash: as of `Prompt`.
        category: the benchmark's own, if it has any.
        synthetic: whether the benchmark says that the image is; None where it does not say.
    """

    id: str
    text: str
    image: Path | Image.Image
    image_hash: str
    category: str | None = None
    synthetic: bool | None = None

    def prompt(self) -> Prompt:
        """With the image in memory. Raises CalibrationError when its file has become unreadable."""
        image = open_image(self.image, self.id) if isinstance(self.image, Path) else self.image
        return Prompt(self.id, image, self.text)


@dataclass(frozen=True)
class Skipped:
    """An entry that is not evaluated."""

    id: str
    why: str


@dataclass(frozen=True)
class BenchmarkSet:
    """A benchmark as found.

    Attributes:
        name: as the user gave it; a file by its name.
        items: usable ones, in the benchmark's order.
        skipped: the others.
        notes: sentences for whoever reads the results.
    """

    name: str
    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


def item_of_file(id: str, text: str, image: Path, category: str | None = None, synthetic: bool | None = None) -> Item:
    """An item whose image was read once and let go. Raises CalibrationError when it is missing or unreadable."""
    return Item(id, text, image, Prompt(id, open_image(image, "not usable"), text).image_hash, category, synthetic)
