"""Words and marks in pictures, for labelled panels."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tempoquant.evaluate.metrics.video_metrics import Video

BACKGROUND = (255, 255, 255)
INK = (28, 32, 38)
FAINT = (110, 118, 129)
GOOD = (26, 127, 55)
BAD = (207, 34, 46)
"""The colours of GitHub's text, green and red, so that pictures fit into a README."""


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's built-in font (Latin letters only), so that pictures look the same on every
    machine. Size in pixels.
    """
    return ImageFont.load_default(size)


def enlarge(video: Video, target_width: int) -> Video:
    """Repeat pixels a whole number of times (at least once) towards `target_width`, so that each
    one stays visible.
    """
    factor = max(1, target_width // video.shape[2])
    return np.asarray(video.repeat(factor, axis=1).repeat(factor, axis=2))


def draw_text(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    max_width: int,
    color: tuple[int, ...] = INK,
) -> None:
    """Write one line at `place` (left, top); text beyond `max_width` pixels is cut off and ends in
    "...".
    """
    shown = text
    while shown and draw.textlength(shown, font=font(size)) > max_width:
        shown = shown.removesuffix("...")[:-1].rstrip() + "..."
        if shown == "...":
            break
    draw.text(place, shown, font=font(size), fill=color)


def draw_mark(draw: ImageDraw.ImageDraw, place: tuple[int, int], size: int, good: bool) -> None:
    """Draw a green tick or a red cross, `size` pixels wide, at `place` (left, top). The built-in
    font has neither.
    """
    left, top = place
    stroke = max(2, size // 6)
    if good:
        points = [(left, top + size * 0.55), (left + size * 0.38, top + size * 0.9), (left + size, top + size * 0.12)]
        draw.line(points, fill=GOOD, width=stroke, joint="curve")
    else:
        near, far = size * 0.1, size * 0.9
        draw.line([(left + near, top + near), (left + far, top + far)], fill=BAD, width=stroke)
        draw.line([(left + near, top + far), (left + far, top + near)], fill=BAD, width=stroke)


def canvas(width: int, height: int) -> Image.Image:
    """Return an empty RGB picture."""
    return Image.new("RGB", (width, height), BACKGROUND)
