"""VMAF and VMAF-NEG (Netflix), by the libvmaf inside imageio-ffmpeg's ffmpeg, which holds the
models.

VMAF was trained on people judging compressed video at the size of a screen: at a few dozen pixels
it means nothing. NEG does not reward sharpening. Both compare with a reference, so a good video of
other content scores low.
"""

import functools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg

from tempoquant.errors import ModelError

SMALLEST_MEANINGFUL = 200
"""Pixels of the shorter side."""
SMALLEST = 17
"""Pixels of the shorter side. libvmaf ends without a message on a smaller video."""
MISSING = "VMAF was not measured: this ffmpeg was built without libvmaf; imageio-ffmpeg's own binary has it."
SMALL = f"VMAF is not meaningful under {SMALLEST_MEANINGFUL} pixels."
TOO_SMALL = f"VMAF was not measured: libvmaf needs {SMALLEST} pixels a side."
_VERSIONS = {"vmaf": "vmaf_v0.6.1", "vmaf_neg": "vmaf_v0.6.1neg"}


class Vmaf(NamedTuple):
    """Mean over frames, 0 … 100."""

    vmaf: float
    vmaf_neg: float


@functools.cache
def has_libvmaf() -> bool:
    """Return whether the ffmpeg that imageio-ffmpeg found can measure VMAF."""
    filters = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-filters"], capture_output=True, text=True, check=False
    )
    return " libvmaf " in filters.stdout


def vmaf(reference: Path, other: Path) -> Vmaf:
    """Compare two video files of equal size and number of frames.

    Raises:
        ModelError: ffmpeg fails; the message holds its last line, or its exit code.
    """
    models = "|".join(rf"version={version}\:name={name}" for name, version in _VERSIONS.items())
    with tempfile.TemporaryDirectory() as scratch:
        log = "vmaf.json"
        chain = (
            "[0:v]setpts=PTS-STARTPTS,format=yuv420p[other];[1:v]setpts=PTS-STARTPTS,format=yuv420p[reference];"
            f"[other][reference]libvmaf=model='{models}':log_fmt=json:log_path={log}:shortest=1"
        )
        inputs = [word for file in (other, reference) for word in ("-i", str(file.resolve()))]
        program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", *inputs, "-lavfi", chain]
        # In its own folder: the path of the log would have to be escaped twice.
        done = subprocess.run([*program, "-f", "null", "-"], capture_output=True, text=True, check=False, cwd=scratch)
        if done.returncode != 0:
            silence = f"it ended with code {done.returncode}; libvmaf needs {SMALLEST} pixels a side."
            reason = (done.stderr.strip().splitlines() or [silence])[-1]
            raise ModelError(f"ffmpeg cannot measure VMAF of {other}: {reason}")
        found = json.loads((Path(scratch) / log).read_text(encoding="utf-8"))["pooled_metrics"]
    return Vmaf(*(float(found[name]["mean"]) for name in _VERSIONS))
