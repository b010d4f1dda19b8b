"""Pictures and videos of a page: embedded within a budget, the rest in a folder beside it."""

import base64
import hashlib
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tempoquant.errors import EvaluationError
from tempoquant.evaluate.files import whole_file
from tempoquant.report.merge import Item

THUMBNAIL_WIDTH = 192
"""Pixels; the given picture is shown small, beside its prompt."""


class Media:
    """The media of a page, collected by `add_thumbnail` and `add_videos`, whose results the page
    refers to.

    Videos within the budget are embedded as base64 in separate elements, so that a browser decodes
    one video at a time and not all when the page opens. The rest is copied to the folder `beside`,
    under the hash of its content, so that no name from a benchmark chooses a path.

    Attributes:
        beside: folder of the videos that are not embedded, next to the page.
        left: remaining bytes of the budget, base64 counted.
        embedded: element id to base64 text.
        num_beside: videos in that folder.
    """

    def __init__(self, beside: Path, budget_bytes: int) -> None:
        self.beside = beside
        self.left = budget_bytes
        self.embedded: dict[str, str] = {}
        self.num_beside = 0
        self._known: dict[str, dict[str, str]] = {}

    def add_thumbnail(self, picture: Path) -> str:
        """Return a data URL of the picture, reduced. Raises EvaluationError if it is no picture."""
        try:
            with Image.open(picture) as opened:
                small = opened.convert("RGB")
                if small.width > THUMBNAIL_WIDTH:
                    small.thumbnail((THUMBNAIL_WIDTH, THUMBNAIL_WIDTH * 4))
        except OSError as error:
            raise EvaluationError(f"{picture} is no picture that can be read ({error}).") from error
        buffer = io.BytesIO()
        # JPEG blurs the few pixels of a tiny model's picture; its PNG is as small.
        small.save(buffer, format="PNG" if small.width < THUMBNAIL_WIDTH else "JPEG", quality=85)
        kind = "png" if small.width < THUMBNAIL_WIDTH else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    def add_videos(self, item: Item) -> dict[str, dict[str, str]]:
        """Add all videos of one item, by label: all embedded or all beside, {"element": …} or
        {"file": …}.
        """
        size = sum(_base64_size(file.stat().st_size) for file in item.videos.values())
        inside = size <= self.left
        return {label: self._add(file, inside) for label, file in item.videos.items()}

    def _add(self, file: Path, inside: bool) -> dict[str, str]:
        content = file.read_bytes()
        name = hashlib.sha256(content).hexdigest()[:20]
        if name in self._known:
            return self._known[name]
        if inside:
            self.left -= _base64_size(len(content))
            self.embedded[f"video-{name}"] = base64.b64encode(content).decode()
            self._known[name] = {"element": f"video-{name}"}
        else:
            self.num_beside += 1
            self.beside.mkdir(exist_ok=True)
            target = self.beside / f"{name}{file.suffix.lower()}"
            if not target.is_file():
                with whole_file(target) as temporary:
                    shutil.copyfile(file, temporary)
            self._known[name] = {"file": f"{self.beside.name}/{target.name}"}
        return self._known[name]


def by_loss(items: Sequence[Item], losses: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Return positions of items, the largest loss first: the page embeds these if not all fit.

    `losses`: position to label to loss, None for failures and missing measurements; a failure comes
    first.
    """

    def worst(position: int) -> float:
        if items[position].failed:
            return float("inf")
        known = [loss for loss in losses[position].values() if loss is not None]
        return max(known, default=float("-inf"))

    return sorted(range(len(items)), key=worst, reverse=True)


def _base64_size(num_bytes: int) -> int:
    return (num_bytes + 2) // 3 * 4
