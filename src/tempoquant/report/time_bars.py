"""The predicted time of a video by part, from `tempoquant plan MODEL --time --json`: stacked bars,
a bar a speed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempoquant.errors import EvaluationError
from tempoquant.planning.time_plan import DENOISING

WIDTH, LEFT, RIGHT, BAR, GAP = 340, 62, 58, 20, 8
"""Units of the viewBox: of the whole, beside the bars, of a bar's height, between two bars."""

SEGMENTS = (
    "linears",
    "self-attention",
    "cross-attention",
    "elementwise",
    "waiting for weights",
    "texts and autoencoder",
    "all else",
)
"""Of a bar, in order: parts of the denoiser's calls, what comes before and after them, and what
hardly counts.
"""
_BESIDE, _REST = SEGMENTS[-2:]


@dataclass(frozen=True)
class Segment:
    """One part of a bar. index: in SEGMENTS."""

    index: int
    name: str
    seconds: float
    x: float
    width: float


@dataclass(frozen=True)
class Bar:
    """One video: "16-bit", or a speed; `y` of its top."""

    label: str
    seconds: float
    y: float
    segments: tuple[Segment, ...]

    @property
    def sentence(self) -> str:
        """Return what the bar says, for those who do not see it."""
        parts = ", ".join(f"{each.name} {each.seconds:.3g} s" for each in self.segments)
        return f"{self.label}: {self.seconds:.3g} s, of which {parts}"


@dataclass(frozen=True)
class TimeFigure:
    """The bars of one GPU. title: the GPU; kind: what the figures are, in words."""

    title: str
    kind: str
    bars: tuple[Bar, ...]

    @property
    def height(self) -> float:
        """Return the height of the viewBox."""
        return GAP + len(self.bars) * (BAR + GAP)


@dataclass(frozen=True)
class TimePart:
    """A prediction as the page shows it. about: model, size, frames and steps, in words."""

    about: str
    figures: tuple[TimeFigure, ...]
    notes: tuple[str, ...]


def read_times(file: Path) -> TimePart:
    """Read a prediction.

    Raises:
        EvaluationError: the file is not what the command printed.
        OSError: it cannot be read.
    """
    try:
        return times_of(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise EvaluationError(
            f"{file} is not what `tempoquant plan MODEL --time --json` prints ({error!r}): make it again."
        ) from error


def times_of(record: Mapping[str, Any]) -> TimePart:
    """Return the record of the command as bars.

    Raises KeyError, TypeError, ValueError or AttributeError for another record.
    """
    time = record["time"]
    calls = int(time["calls_a_step"])
    about = (
        f"{record['model']}, {record['height']} × {record['width']}, {record['num_frames']} frames, "
        f"{time['num_steps']} steps of {calls} call{'' if calls == 1 else 's'}"
    )
    figures = [
        TimeFigure(str(gpu["gpu"]), str(gpu["kind"]), _bars(gpu["videos"], int(time["num_steps"])))
        for gpu in time["gpus"]
        if gpu["videos"]
    ]
    notes = {f"{video['label']}: {video['skipping']}": None for gpu in time["gpus"] for video in gpu["videos"]}
    missing = {str(sentence): None for gpu in time["gpus"] for sentence in gpu["does_not_fit"].values()}
    return TimePart(about, tuple(figures), (*notes, *missing))


def _bars(videos: list[Mapping[str, Any]], num_steps: int) -> tuple[Bar, ...]:
    longest = max(float(video["video_seconds"]) for video in videos)
    scale = (WIDTH - LEFT - RIGHT) / longest
    return tuple(_bar(video, num_steps, scale, GAP + index * (BAR + GAP)) for index, video in enumerate(videos))


def _bar(video: Mapping[str, Any], num_steps: int, scale: float, y: float) -> Bar:
    by_name = dict.fromkeys(SEGMENTS, 0.0)
    for part in video["step"]:
        by_name[part["name"] if part["name"] in by_name else _REST] += num_steps * float(part["seconds"])
    for phase in video["phases"]:
        by_name[_BESIDE] += 0.0 if phase["name"] == DENOISING else float(phase["seconds"])
    segments, x = [], float(LEFT)
    for index, (name, seconds) in enumerate(by_name.items()):
        if seconds > 0:
            segments.append(Segment(index, name, seconds, x, scale * seconds))
            x += scale * seconds
    return Bar(str(video["label"]), float(video["video_seconds"]), y, tuple(segments))
