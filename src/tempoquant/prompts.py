"""Prompts: a text, an id, and the model's other conditions. They are read from jsonl files or
folders. Calibration and evaluation must not share any.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from tempoquant.errors import CalibrationError
from tempoquant.images import as_seen, open_image

CLIPS = ("pose", "face")
"""Clips that tell some models how the person in the image moves; also their keys in a jsonl
line.
"""


@dataclass(frozen=True)
class Prompt:
    """The inputs of one generation.

    Attributes:
        id: names the prompt in provenance and results.
        image: the first frame, or a picture of the person whom the video shows; of any mode,
            converted by `images.as_seen`. None for a model that takes only text.
        text: a description of the video.
        video: a file or a folder of frames that begins with the image; None for none. Only
            recording from latents reads it.
        clips: files or folders of frames, by the names in `CLIPS`.
    """

    id: str
    image: Image.Image | None
    text: str
    video: Path | None = None
    clips: Mapping[str, Path] = field(default_factory=dict)

    @property
    def image_hash(self) -> str:
        """Return the SHA-256 of the image's size and RGB bytes (not of its file, so that a
        re-encoded copy is still found).

        It is "" without an image.
        """
        if self.image is None:
            return ""
        rgb = as_seen(self.image)
        return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a jsonl file, or from every *.jsonl of a folder.

    A line is {"prompt"[, "id"][, "image"][, "video"][, "pose"][, "face"]}; `Prompt` describes each.
    Paths are relative to the jsonl's folder. Raises CalibrationError that names the file, line and
    remedy.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise CalibrationError(f'{path} holds no .jsonl file: add one with a line {{"prompt", "image"}} per item.')
        prompts = [prompt for file in files for prompt in _load_file(file)]
    elif path.is_file():
        prompts = _load_file(path)
    else:
        raise CalibrationError(f"there is no prompt file or folder {path}.")
    ids = [prompt.id for prompt in prompts]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        raise CalibrationError(f"{path} uses the id {twice[0]!r} twice: ids must be unique.")
    if not prompts:
        raise CalibrationError(f"{path} holds no prompts.")
    return prompts


def _load_file(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split at U+2028 in a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
            text = record["prompt"]
            paths = {
                key: file.parent / record[key] for key in ("image", "video", *CLIPS) if record.get(key) is not None
            }
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"{where} is not a JSON object with a prompt, and paths of an image and of clips where it has them "
                f"({error})."
            ) from error
        if not isinstance(text, str):
            raise CalibrationError(f"{where}: prompt is not a text.")
        image = open_image(paths.pop("image"), where) if "image" in paths else None
        for key, path in paths.items():
            if not path.exists():
                raise CalibrationError(f"{where}: there is no {key} {path}.")
        id = str(record.get("id", f"{file.stem}-{number}"))
        # Paths are resolved, since clips are read later, perhaps by a process in another folder.
        clips = {key: path.resolve() for key, path in paths.items()}
        prompts.append(Prompt(id, image, text, clips.pop("video", None), clips))
    return prompts


class Identified(Protocol):
    """An item that can be compared with the prompts of calibration, such as a `Prompt`."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def image_hash(self) -> str: ...


def calibrated_on(prompts: Iterable[Identified], calibrated: Iterable[dict[str, str]]) -> list[str]:
    """Return the ids of the prompts that were also used for calibration, in order.

    Prompts match by id, or by image and text. If one of two prompts has no image, their texts alone
    decide, since the model may have ignored the other's image.

    Args:
        calibrated: provenance records {"id", "prompt", "image_sha256"}, as a checkpoint stores
            them.
    """
    records = list(calibrated)
    ids = {record["id"] for record in records}
    images: dict[str, set[str]] = {}
    for record in records:
        images.setdefault(record["prompt"], set()).add(record["image_sha256"])

    def is_known(prompt: Identified) -> bool:
        known = images.get(prompt.text, set())
        return bool(known) and (not prompt.image_hash or bool(known & {prompt.image_hash, ""}))

    return [prompt.id for prompt in prompts if prompt.id in ids or is_known(prompt)]


def check_disjoint(prompts: Sequence[Prompt], calibrated: Iterable[dict[str, str]]) -> None:
    """Raise CalibrationError if a prompt was also used for calibration; see `calibrated_on`."""
    shared = calibrated_on(prompts, calibrated)
    if shared:
        raise CalibrationError(
            f"{len(shared)} evaluation prompt(s) were calibrated on, such as {shared[0]!r}: evaluate on other prompts."
        )


def provenance(prompts: Iterable[Prompt]) -> list[dict[str, str]]:
    """Return the records that a checkpoint stores about its calibration prompts."""
    return [{"id": p.id, "prompt": p.text, "image_sha256": p.image_hash} for p in prompts]
