"""Result files: written whole under a temporary name beside their place, then renamed, so that an
interruption leaves the old file or the new one.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image

from tempoquant.errors import OutputError
from tempoquant.evaluate.metrics.video_metrics import Video

CONSTANT_RATE_FACTOR = 16
"""x264's quality, 0 lossless … 51: low enough that the encoder adds no visible error of its own."""


def check_place(path: Path, suffix: str) -> None:
    """Check before long work that a file can be written there. Raises OutputError if it cannot."""
    if path.suffix.lower() != suffix.lower():
        raise OutputError(f"{path} does not end in {suffix}, the one kind that is written here.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give the name of a file.")
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent}: make it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {path.parent} is not writable: choose another.")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `path`; on success it replaces `path`, on failure
    it is removed.

    Raises OutputError as `check_place` does.
    """
    check_place(path, path.suffix)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text with a newline at its end."""
    with whole_file(path) as temporary:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture."""
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def write_mp4(path: Path, video: Video, frames_per_second: int) -> None:
    """Write H.264 in yuv420p, which every player and browser shows.

    Odd widths and heights, which yuv420p cannot hold, get one more row or column by repeating the
    last.

    Raises:
        OutputError: the name does not end in .mp4, or the encoder failed (for example on a full
            disk).
    """
    odd = [(0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)]
    encoding = {
        "codec": "libx264",
        "pixelformat": "yuv420p",
        "output_params": ["-crf", str(CONSTANT_RATE_FACTOR), "-movflags", "+faststart"],
    }
    _encode(path, ".mp4", np.pad(video, odd, mode="edge"), frames_per_second, encoding)


def write_lossless(path: Path, video: Video, frames_per_second: int) -> None:
    """Write FFV1 in RGB, which `read_lossless` reads back bit by bit. Raises OutputError as
    `write_mp4` does.
    """
    _encode(path, ".mkv", video, frames_per_second, {"codec": "ffv1", "pixelformat": "bgr0", "output_params": []})


def read_lossless(path: Path) -> Video:
    """Read all frames of a file of `write_lossless`. Raises OutputError if it cannot be read."""
    try:
        with contextlib.closing(imageio.get_reader(path, format="FFMPEG")) as reader:
            return np.stack([frame for frame in reader])  # noqa: C416 (list() would ask for a length, which is infinite)
    except (OSError, ValueError, RuntimeError, IndexError) as error:
        raise OutputError(
            f"{path} cannot be read ({error}): remove it, and the same command makes it again."
        ) from error


def _encode(path: Path, suffix: str, video: Video, frames_per_second: int, encoding: dict[str, Any]) -> None:
    check_place(path, suffix)
    with whole_file(path) as temporary:
        try:
            writer: Any = imageio.get_writer(
                temporary,
                format="FFMPEG",
                fps=frames_per_second,
                macro_block_size=1,
                ffmpeg_log_level="quiet",
                **encoding,
            )
            with contextlib.closing(writer):
                for frame in video:
                    writer.append_data(frame)
        except OSError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            free_mib = shutil.disk_usage(path.parent).free / 2**20
            raise OutputError(
                f"{path} could not be encoded ({reason}); {free_mib:.1f} MiB are free there: is that too little?"
            ) from error


def _umask() -> int:
    """Return the umask: mkstemp makes files that only their owner reads, and results get the usual
    permissions.
    """
    mask = os.umask(0)
    os.umask(mask)
    return mask
