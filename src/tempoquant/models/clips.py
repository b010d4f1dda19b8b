"""Clips of prompts, read frame by frame, from a file or a folder of images."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
from PIL import Image, ImageOps

from tempoquant.checkpoint.files import sha256_of
from tempoquant.errors import CalibrationError
from tempoquant.images import as_seen, first_frame, open_image
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.prompts import Prompt

_NUMBERS = re.compile(r"(\d+)")
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_ANIMATED_IMAGES = {".gif", ".webp", ".png"}


def clip_hash(video: Path) -> str:
    """Return the hexadecimal SHA-256 of a video file, or of the names and contents of a folder's
    frames.
    """
    if video.is_file():
        return sha256_of(video)
    lines = [f"{file.name}:{sha256_of(file)}\n" for file in _frame_files(video)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_clip(prompt: Prompt, settings: SamplingSettings) -> list[Image.Image]:
    """Return `num_frames` frames of a prompt's video, as `read_frames` does; without a video, the
    image repeated.

    Raises:
        CalibrationError: the video cannot be read, or is too short; or there is neither video nor
            image.
    """
    if prompt.video is not None:
        return read_frames(prompt.id, prompt.video, settings.num_frames, (settings.width, settings.height))
    if prompt.image is None:
        raise CalibrationError(f"prompt {prompt.id!r} has neither a video nor an image: give it one of them.")
    return [first_frame(prompt.image, settings.width, settings.height)] * settings.num_frames


def read_frames(id: str, video: Path, num_frames: int, size: tuple[int, int]) -> list[Image.Image]:
    """Return the first frames of a video, cropped to the aspect ratio of a size (width, height) and
    scaled to it.

    Consecutive frames are taken, at any frame rate of the video.

    Args:
        id: of the prompt that the video belongs to, for messages.

    Raises:
        CalibrationError: the video cannot be read, or is too short.
    """
    frames: list[Image.Image] = []
    for frame in _frames(video):
        frames.append(ImageOps.fit(frame, size))
        if len(frames) == num_frames:
            return frames
    raise CalibrationError(
        f"prompt {id!r}: {video} has {len(frames)} frames, {num_frames} are wanted: give a longer clip, or ask for "
        "fewer frames."
    )


def _frames(video: Path) -> Iterator[Image.Image]:
    if video.is_dir():
        yield from (open_image(file) for file in _frame_files(video))
        return
    plugin = "pillow" if video.suffix.lower() in _ANIMATED_IMAGES else "FFMPEG"  # otherwise imageio tries all it knows
    try:
        frame: Any
        for frame in imageio.imiter(video, plugin=plugin):
            yield as_seen(Image.fromarray(frame))
    except (OSError, ValueError, TypeError, RuntimeError, IndexError, SyntaxError) as error:
        raise CalibrationError(f"{video} cannot be read as a video ({error}): give an mp4, a gif or frames.") from error


def _frame_files(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.suffix.lower() in _IMAGES]
    return sorted(files, key=_place)


def _place(file: Path) -> list[str | int]:
    """Return texts and numbers in turn, so that frame_10 comes after frame_2."""
    return [int(part) if part.isdecimal() else part for part in _NUMBERS.split(file.name)]
