"""The procedural world the bundled model was trained on: coloured shapes that move over soft
backgrounds.

A `Scene` is a background and one or two `Mover`s. `render` draws it, and `describe` puts its
motions into words. The first frame shows the objects; only the words tell where they move, so a
model that follows the words has understood them.

Coordinates are pixels of a 64×64 frame, x to the right, y down, measured at pixel centres. Speeds
are pixels per frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FRAME_SIZE = 64
"""Height and width of a frame, pixels."""
NUM_FRAMES = 17
"""Frames of a clip: 4·4 + 1, what a causal VAE with temporal stride 4 takes."""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.16, 0.16),
    "yellow": (0.93, 0.83, 0.15),
    "green": (0.15, 0.72, 0.22),
    "cyan": (0.14, 0.80, 0.80),
    "blue": (0.18, 0.28, 0.90),
    "magenta": (0.84, 0.20, 0.80),
}
"""Colour word to RGB in [0, 1]. Hues lie at least 45 degrees apart, chroma (max − min) is at least
0.55.
"""
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Direction word to unit step (x, y)."""
STILL = "still"
"""The direction of a mover that does not move; its speed is `None`."""
SPEEDS: dict[str, float] = {"slowly": 0.75, "quickly": 1.6}
"""Speed word to pixels per frame: 12 and 25.6 pixels over a clip of 17 frames."""

MARGIN = 1.5
"""Pixels that always stay free between a mover and the frame's edge."""
MIN_GAP = 3.0
"""Pixels that always stay free between two movers."""
BACKGROUND_KINDS: tuple[str, ...] = ("gradient", "blobs", "stripes")

# The largest distance of a shape's outline from its centre, in radii, and its area, in radii² (see
# `_signed_distance`).
_EXTENT = {"circle": 1.0, "square": 0.88 * 2**0.5, "triangle": 1.2, "diamond": 1.25}
_AREA = {"circle": np.pi, "square": (2 * 0.88) ** 2, "triangle": 3 * 3**0.5 * 0.6**2, "diamond": 2 * 1.25**2}

Motion = tuple[str, "str | None"]
"""(direction, speed word), or (STILL, None)."""
MOTIONS: tuple[Motion, ...] = ((STILL, None), *((d, s) for d in DIRECTIONS for s in SPEEDS))


@dataclass(frozen=True)
class Mover:
    """One shape and its motion. `x`, `y`: centre in the first frame; `radius`: about half its
    width; both in pixels.
    """

    color: str
    shape: str
    direction: str
    speed: str | None
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        if self.color not in COLORS or self.shape not in SHAPES:
            raise ValueError(f"unknown colour or shape: {self.color!r}, {self.shape!r}")
        if (self.direction, self.speed) not in MOTIONS:
            raise ValueError(f"unknown motion: {self.direction!r}, {self.speed!r}; one of {MOTIONS}")

    @property
    def velocity(self) -> tuple[float, float]:
        """Return (x, y) in pixels per frame."""
        if self.speed is None:
            return (0.0, 0.0)
        step, pixels = DIRECTIONS[self.direction], SPEEDS[self.speed]
        return (step[0] * pixels, step[1] * pixels)

    @property
    def extent(self) -> float:
        """Return the radius of the circle around the centre that holds the whole shape, in
        pixels.
        """
        return self.radius * _EXTENT[self.shape]

    def track(self, num_frames: int = NUM_FRAMES) -> NDArray[np.float64]:
        """Return the centre (x, y) in every frame: (num_frames, 2)."""
        return np.array([self.x, self.y]) + np.arange(num_frames)[:, None] * np.array(self.velocity)


@dataclass(frozen=True)
class Background:
    """A smooth, unsaturated picture. `parameters` are drawn once, and `_paint_background`
    interprets them.
    """

    kind: str
    color_from: tuple[float, float, float]
    color_to: tuple[float, float, float]
    parameters: tuple[float, ...]


@dataclass(frozen=True)
class Scene:
    """One clip: a background and one or two movers of different colours."""

    background: Background
    movers: tuple[Mover, ...]

    def __post_init__(self) -> None:
        if len({mover.color for mover in self.movers}) != len(self.movers) or not self.movers:
            raise ValueError("a scene has at least one mover, and each its own colour")


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a random scene, with one mover or two (half each), in which nothing leaves the frame or
    touches.
    """
    background = _sample_background(rng)
    num_movers = int(rng.integers(1, 3))
    colors = rng.permutation(list(COLORS))[:num_movers]
    while True:
        movers = tuple(_sample_mover(rng, str(color), crowded=num_movers > 1) for color in colors)
        if all(_stays_inside(mover) for mover in movers) and _stay_apart(movers):
            return Scene(background, movers)


def with_other_motions(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the same first frame with other motions of every mover; `scene` itself if no other
    motion fits in the frame.
    """
    options = [[m for m in _feasible_motions(mover) if m != (mover.direction, mover.speed)] for mover in scene.movers]
    if not all(options):
        return scene
    for _ in range(200):
        picks = [choices[int(rng.integers(len(choices)))] for choices in options]
        movers = tuple(replace(m, direction=d, speed=s) for m, (d, s) in zip(scene.movers, picks, strict=True))
        if _stay_apart(movers):
            return replace(scene, movers=movers)
    return scene


def describe(scene: Scene) -> str:
    """Return the prompt, such as "a red circle moves left slowly and a blue square stays still"."""
    return " and ".join(_describe_mover(mover) for mover in scene.movers)


def render(
    scene: Scene, num_frames: int = NUM_FRAMES, size: int = FRAME_SIZE, first_frame: int = 0
) -> NDArray[np.uint8]:
    """Draw frames `first_frame` … `first_frame + num_frames − 1`: (num_frames, size, size, 3),
    uint8, smooth edges.
    """
    pixel = (np.arange(size, dtype=np.float32) + 0.5) * (FRAME_SIZE / size)
    canvas = np.repeat(_paint_background(scene.background, pixel)[None], num_frames, axis=0)
    for mover in scene.movers:
        centre = mover.track(first_frame + num_frames)[first_frame:].astype(np.float32)
        dx = pixel[None, None, :] - centre[:, 0, None, None]
        dy = pixel[None, :, None] - centre[:, 1, None, None]
        distance = _signed_distance(mover.shape, dx, dy, mover.radius) * (size / FRAME_SIZE)
        coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        canvas += coverage * (np.array(COLORS[mover.color], dtype=np.float32) - canvas)
    return (np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def shape_coverage(shape: str, centre: tuple[float, float], area: float, size: int = FRAME_SIZE) -> NDArray[np.float32]:
    """Compute how much of each pixel a shape with this centre (x, y) and area in pixels covers:
    (size, size).
    """
    pixel = np.arange(size, dtype=np.float32) + 0.5
    radius = float(np.sqrt(area / _AREA[shape]))
    dx, dy = pixel[None, :] - np.float32(centre[0]), pixel[:, None] - np.float32(centre[1])
    return np.clip(0.5 - _signed_distance(shape, dx, dy, radius), 0.0, 1.0)


def _describe_mover(mover: Mover) -> str:
    subject = f"a {mover.color} {mover.shape}"
    return f"{subject} stays still" if mover.speed is None else f"{subject} moves {mover.direction} {mover.speed}"


def _sample_mover(rng: np.random.Generator, color: str, crowded: bool) -> Mover:
    """Draw a mover: its place first, then a motion that fits, so that the place tells little about
    the motion.
    """
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    radius = float(rng.uniform(7.0, 8.5 if crowded else 10.0))
    reach = radius * _EXTENT[shape] + MARGIN
    x, y = (float(v) for v in rng.uniform(reach, FRAME_SIZE - reach, 2))
    still = Mover(color, shape, STILL, None, x, y, radius)
    motions = _feasible_motions(still)
    # Fast motions fit at fewer places: twice the weight gives slow and fast the same share.
    weights = np.array([2.0 if speed == "quickly" else 1.0 for _, speed in motions])
    direction, speed = motions[int(rng.choice(len(motions), p=weights / weights.sum()))]
    return replace(still, direction=direction, speed=speed)


def _feasible_motions(mover: Mover) -> list[Motion]:
    return [(d, s) for d, s in MOTIONS if _stays_inside(replace(mover, direction=d, speed=s))]


def _stays_inside(mover: Mover) -> bool:
    track, reach = mover.track(), mover.extent + MARGIN - 1e-6
    return bool((track >= reach).all() and (track <= FRAME_SIZE - reach).all())


def _stay_apart(movers: tuple[Mover, ...]) -> bool:
    for index, one in enumerate(movers):
        for other in movers[index + 1 :]:
            distance = np.linalg.norm(one.track() - other.track(), axis=1)
            if distance.min() < one.extent + other.extent + MIN_GAP:
                return False
    return True


def _signed_distance(
    shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32], radius: float
) -> NDArray[np.float32]:
    """Compute the distance to the outline in pixels, negative inside. Convex shapes are
    intersections of half-planes.
    """
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(0.88 * radius)
    if shape == "diamond":
        return (np.abs(dx) + np.abs(dy) - np.float32(1.25 * radius)) * np.float32(0.5**0.5)
    half_plane = np.abs(dx) * np.float32(0.75**0.5) - dy * np.float32(0.5)
    return np.maximum(half_plane, dy) - np.float32(0.6 * radius)


def _sample_background(rng: np.random.Generator) -> Background:
    kind = BACKGROUND_KINDS[int(rng.integers(len(BACKGROUND_KINDS)))]
    grays = rng.uniform(0.25, 0.8, 2)
    tints = rng.uniform(-0.05, 0.05, (2, 3))
    ends = [(float(g + t[0]), float(g + t[1]), float(g + t[2])) for g, t in zip(grays, tints, strict=True)]
    return Background(kind, ends[0], ends[1], tuple(float(v) for v in rng.uniform(0.0, 1.0, 8)))


def _paint_background(background: Background, pixel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Paint `color_from` blended into `color_to` by a smooth field in [0, 1]: (size, size, 3)."""
    x, y = np.meshgrid(pixel / FRAME_SIZE, pixel / FRAME_SIZE)
    p = background.parameters
    angle = 2.0 * np.pi * p[0]
    along = np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5)
    if background.kind == "gradient":
        field = 0.5 + along / 1.42
    elif background.kind == "stripes":
        field = 0.5 + 0.5 * np.sin(2.0 * np.pi * ((1.0 + 2.0 * p[1]) * along + p[2]))
    else:
        first = np.exp(-((x - p[1]) ** 2 + (y - p[2]) ** 2) / (0.03 + 0.1 * p[3]))
        second = np.exp(-((x - p[4]) ** 2 + (y - p[5]) ** 2) / (0.03 + 0.1 * p[6]))
        field = np.maximum(first, second)
    field = field.astype(np.float32)[..., None]
    start, end = (np.array(c, dtype=np.float32) for c in (background.color_from, background.color_to))
    return start + field * (end - start)
