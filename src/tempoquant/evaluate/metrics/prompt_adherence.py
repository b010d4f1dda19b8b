"""Prompt adherence: whether a video of the bundled world shows its prompt, decided from the pixels
alone.

For each object of the prompt, the pixels of its colour are tracked. The displacement of their
centre from the first to the last frame is classified as still, or as a direction at a speed, with
thresholds halfway between the speeds that prompts can name. Separately, the object must still look
as in the first frame. No network judges, so a result can be checked by eye, and quantizing a model
cannot change its judge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tempoquant.tiny.world import COLORS, DIRECTIONS, NUM_FRAMES, SHAPES, SPEEDS, STILL, Motion, shape_coverage

FloatArray = NDArray[np.floating]

_PATTERN = re.compile(
    rf"\ba ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"(?:stays ({STILL})|moves ({'|'.join(DIRECTIONS)}) ({'|'.join(SPEEDS)}))\b"
)
MIN_AREA = 30.0
"""Pixels; the smallest object of the world covers about 100."""
MIN_COMPACTNESS = 0.5
"""Area over 2π·(mean squared distance from the centre): 1 for a disc, 0.8 for a triangle, 0.1 for
scattered noise.
"""
MAX_SIDEWAYS_FRACTION = 0.5
"""A displacement has a direction if its sideways share is at most this; beyond, it is no motion of
the world.
"""
AREA_BAND = (0.6, 1.6)
"""Area in every frame, relative to the first. Drawn scenes stay within 0.95 … 1.06."""
MIN_OVERLAP = 0.7
"""Overlap (intersection over union) of the object in the last and first frame, centres aligned;
drawn: 0.9 and more.
"""


@dataclass(frozen=True)
class ExpectedMotion:
    """The prompt's words for one object. `motion` is (direction, speed word), or ("still",
    None).
    """

    color: str
    shape: str
    motion: Motion


@dataclass(frozen=True)
class MoverAdherence:
    """The motion and shape of one object in the video.

    Attributes:
        motion: None if the object was lost or its displacement is none of the world's motions.
        displacement: (x, y) pixels, last minus first frame.
        area_ratios: smallest and largest area over the first frame's.
        overlap: see `MIN_OVERLAP`.
        shape: the world's shape that fits the last frame best; None if the object was lost.
    """

    expected: ExpectedMotion
    motion: Motion | None
    displacement: tuple[float, float]
    area_ratios: tuple[float, float]
    overlap: float
    shape: str | None

    @property
    def motion_followed(self) -> bool:
        return self.motion == self.expected.motion

    @property
    def appearance_kept(self) -> bool:
        low, high = self.area_ratios
        in_band = AREA_BAND[0] <= low and high <= AREA_BAND[1]
        return in_band and self.overlap >= MIN_OVERLAP and self.shape == self.expected.shape


@dataclass(frozen=True)
class PromptAdherence:
    """One video's result: both verdicts apply to every object of the prompt."""

    movers: tuple[MoverAdherence, ...]

    @property
    def motion_followed(self) -> bool:
        return all(mover.motion_followed for mover in self.movers)

    @property
    def appearance_kept(self) -> bool:
        return all(mover.appearance_kept for mover in self.movers)


def parse_prompt(prompt: str) -> tuple[ExpectedMotion, ...]:
    """Return the objects of a prompt, in order. Raises `ValueError` if it names none of the
    world.
    """
    found = []
    for color, shape, still, direction, speed in _PATTERN.findall(prompt):
        found.append(ExpectedMotion(color, shape, (STILL, None) if still else (direction, speed)))
    if not found:
        raise ValueError(
            f"no object of the bundled world in {prompt!r}; say, for example: a red circle moves left slowly"
        )
    return tuple(found)


def check_prompt(video: NDArray[np.generic], prompt: str) -> PromptAdherence:
    """Judge one video, (frames, height, width, 3), uint8 or floats in [0, 1], against its prompt.

    Distances assume 64×64 frames and the 17 frames of the world. Raises `ValueError` on another
    layout.
    """
    pixels = _as_float(video)
    return PromptAdherence(tuple(_check_mover(pixels, expected) for expected in parse_prompt(prompt)))


def fraction_followed(results: Sequence[PromptAdherence]) -> float:
    """Return the share of videos in which every object moves as prompted, in [0, 1]."""
    return sum(result.motion_followed for result in results) / len(results)


def classify_displacement(x: float, y: float) -> Motion | None:
    """Classify a displacement in pixels over the whole clip; None if it points between the
    directions.
    """
    slow, fast = (speed * (NUM_FRAMES - 1) for speed in SPEEDS.values())
    along, sideways = max(abs(x), abs(y)), min(abs(x), abs(y))
    if np.hypot(x, y) < slow / 2:
        return (STILL, None)
    if sideways > MAX_SIDEWAYS_FRACTION * along:
        return None
    unit = (int(np.sign(x)), 0) if abs(x) > abs(y) else (0, int(np.sign(y)))
    direction = next(name for name, step in DIRECTIONS.items() if step == unit)
    slow_word, fast_word = SPEEDS
    return (direction, slow_word if along < (slow + fast) / 2 else fast_word)


def color_coverage(pixels: FloatArray, color: str) -> NDArray[np.float64]:
    """Compute the share of each pixel that the colour covers, (frames, height, width) in [0, 1]; 0
    if another hue is nearer.

    Backgrounds are gray, so the share of a colour in a mixed edge pixel is its chroma along that
    colour's own.
    """
    chroma = pixels - pixels.mean(axis=-1, keepdims=True)
    names = list(COLORS)
    references = np.array([COLORS[name] for name in names])
    references = references - references.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(references, axis=1)
    along = chroma @ (references / lengths[:, None]).T
    index = names.index(color)
    nearest = along.argmax(axis=-1) == index
    return np.where(nearest, np.clip(along[..., index] / lengths[index], 0.0, 1.0), 0.0)


def _as_float(video: NDArray[np.generic]) -> FloatArray:
    if video.ndim != 4 or video.shape[-1] != 3 or video.shape[0] < 2:
        raise ValueError(f"video has shape {video.shape}; expected (frames, height, width, 3) with at least two frames")
    values = video.astype(np.float64)
    return values / 255.0 if np.issubdtype(video.dtype, np.integer) else values


def _check_mover(pixels: FloatArray, expected: ExpectedMotion) -> MoverAdherence:
    coverage = color_coverage(pixels, expected.color)
    coverage = np.where(coverage > 0.3, coverage, 0.0)
    areas = coverage.sum(axis=(1, 2))
    first, last = coverage[0], coverage[-1]
    if not (_is_compact(first) and _is_compact(last)):
        return MoverAdherence(expected, None, (0.0, 0.0), (0.0, 0.0), 0.0, None)
    start, end = _centre(first), _centre(last)
    x, y = end[0] - start[0], end[1] - start[1]
    ratios = areas / areas[0]
    aligned = _shift(last, -x, -y)
    overlap = float(np.minimum(first, aligned).sum() / np.maximum(first, aligned).sum())
    extremes = (float(ratios.min()), float(ratios.max()))
    return MoverAdherence(expected, classify_displacement(x, y), (x, y), extremes, overlap, _best_shape(last, end))


def _centre(coverage: NDArray[np.float64]) -> tuple[float, float]:
    """Return (x, y) of the centre of mass, in pixels."""
    rows, columns = np.indices(coverage.shape) + 0.5
    total = coverage.sum()
    return float((coverage * columns).sum() / total), float((coverage * rows).sum() / total)


def _is_compact(coverage: NDArray[np.float64]) -> bool:
    area = coverage.sum()
    if area < MIN_AREA:
        return False
    x, y = _centre(coverage)
    rows, columns = np.indices(coverage.shape) + 0.5
    spread = (coverage * ((columns - x) ** 2 + (rows - y) ** 2)).sum() / area
    return bool(area / (2.0 * np.pi * spread) >= MIN_COMPACTNESS)


def _shift(image: NDArray[np.float64], x: float, y: float) -> NDArray[np.float64]:
    """Move an image by (x, y) pixels, bilinear, zeros from outside."""
    for axis, distance in ((1, x), (0, y)):
        whole = int(np.floor(distance))
        share = distance - whole
        image = (1.0 - share) * _roll_in_zeros(image, whole, axis) + share * _roll_in_zeros(image, whole + 1, axis)
    return image


def _roll_in_zeros(image: NDArray[np.float64], distance: int, axis: int) -> NDArray[np.float64]:
    rolled = np.roll(image, distance, axis)
    position = np.arange(image.shape[axis]) - distance
    inside = (position >= 0) & (position < image.shape[axis])
    return rolled * (inside if axis == 1 else inside[:, None])


def _best_shape(coverage: NDArray[np.float64], centre: tuple[float, float]) -> str:
    """Return the shape that, drawn with the same area at the same centre, overlaps most."""
    overlaps = {}
    for shape in SHAPES:
        drawn = shape_coverage(shape, centre, float(coverage.sum()), coverage.shape[0])
        overlaps[shape] = float(np.minimum(coverage, drawn).sum() / np.maximum(coverage, drawn).sum())
    return max(overlaps, key=lambda shape: overlaps[shape])
