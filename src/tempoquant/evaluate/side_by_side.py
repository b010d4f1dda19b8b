"""Pictures that show the effect of four bits: one video with all models side by side, one contact
sheet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tempoquant.errors import ModelError
from tempoquant.evaluate import drawing
from tempoquant.evaluate.files import write_mp4, write_png
from tempoquant.evaluate.metrics.video_metrics import Video

PANEL_WIDTH = 320
"""Pixels of one panel of the video: three of them fill a README's 1000 pixels."""
CELL_WIDTH = 192
"""Pixels of one frame of the contact sheet, which is drawn at twice its size in a README."""
PLAYS = 2
"""Repetitions of each item in the video: a clip of two seconds ends before a viewer has found the
panel.
"""


@dataclass(frozen=True)
class Verdict:
    """A mark beneath a panel. If `good` is None, the words have no mark."""

    words: str
    good: bool | None = None


@dataclass(frozen=True)
class Column:
    """The videos and captions of one model.

    Attributes:
        title: the model's name, such as "16-bit".
        subtitle: a smaller second line, such as "4.38 bits per weight".
        videos: one per item, all of one shape (frames, height, width, 3) uint8.
        verdicts: per item, the captions beneath it; () for none.
    """

    title: str
    subtitle: str
    videos: Sequence[Video]
    verdicts: Sequence[Sequence[Verdict]] = ()


def write_side_by_side(path: Path, columns: Sequence[Column], texts: Sequence[str], frames_per_second: int) -> None:
    """Write one mp4: the models beside each other, the items after each other, each played twice,
    its prompt beneath.

    Raises ModelError if a column lacks a video, OutputError if the file cannot be written.
    """
    _check(columns, texts)
    scenes = [_scene(columns, index, text) for index, text in enumerate(texts)]
    write_mp4(path, np.concatenate([scene for scene in scenes for _ in range(PLAYS)]), frames_per_second)


def write_contact_sheet(path: Path, columns: Sequence[Column], texts: Sequence[str]) -> None:
    """Write one PNG: a row per item; for each model its first, middle and last frame; the prompt
    above the row.

    Raises ModelError if a column lacks a video, OutputError if the file cannot be written.
    """
    _check(columns, texts)
    write_png(path, contact_sheet(columns, texts))


def contact_sheet(columns: Sequence[Column], texts: Sequence[str]) -> Image.Image:
    """Draw the contact sheet: three cells of about CELL_WIDTH pixels for each model."""
    gap, margin, group_gap, text_size = 6, 24, 36, 30
    cells = [[_three_frames(column.videos[index], gap) for column in columns] for index in range(len(texts))]
    cell_height, group_width = cells[0][0].shape[:2]
    has_verdicts = any(column.verdicts for column in columns)
    header, row = 110, cell_height + 2 * text_size + 24 + (text_size + 6 if has_verdicts else 0)
    width = 2 * margin + len(columns) * group_width + (len(columns) - 1) * group_gap
    picture = drawing.canvas(width, header + len(texts) * row + margin)
    draw = ImageDraw.Draw(picture)
    lefts = [margin + number * (group_width + group_gap) for number in range(len(columns))]
    for left, column in zip(lefts, columns, strict=True):
        drawing.draw_text(draw, (left, 18), column.title, 40, group_width)
        drawing.draw_text(draw, (left, 66), column.subtitle, 28, group_width, drawing.FAINT)
    for index, text in enumerate(texts):
        top = header + index * row
        draw.line([(margin, top), (width - margin, top)], fill=(216, 222, 228), width=2)
        drawing.draw_text(draw, (margin, top + 12), text, text_size, width - 2 * margin)
        for left, column, cell in zip(lefts, columns, cells[index], strict=True):
            cell_top = top + text_size + 28
            picture.paste(Image.fromarray(cell), (left, cell_top))
            _draw_verdicts(draw, column, index, (left, cell_top + cell_height + 8), text_size - 4, group_width)
    return picture


def _scene(columns: Sequence[Column], index: int, text: str) -> Video:
    """Draw all frames of one item: (frames, height, width, 3)."""
    gap, margin, header, text_size = 14, 12, 64, 20
    videos = [drawing.enlarge(column.videos[index], PANEL_WIDTH) for column in columns]
    num_frames, panel_height, panel_width = videos[0].shape[:3]
    verdict_height = text_size + 10 if any(column.verdicts for column in columns) else 0
    width = 2 * margin + len(columns) * panel_width + (len(columns) - 1) * gap
    height = header + panel_height + verdict_height + text_size + 24
    picture = drawing.canvas(width + width % 2, height + height % 2)
    draw = ImageDraw.Draw(picture)
    lefts = [margin + number * (panel_width + gap) for number in range(len(columns))]
    for left, column in zip(lefts, columns, strict=True):
        drawing.draw_text(draw, (left, 8), column.title, 26, panel_width)
        drawing.draw_text(draw, (left, 38), column.subtitle, 17, panel_width, drawing.FAINT)
        _draw_verdicts(draw, column, index, (left, header + panel_height + 8), 15, panel_width)
    draw_top = header + panel_height + verdict_height + 8
    drawing.draw_text(draw, (margin, draw_top), text, text_size, width - 2 * margin)
    frames = np.repeat(np.asarray(picture)[None], num_frames, axis=0)
    for left, video in zip(lefts, videos, strict=True):
        frames[:, header : header + panel_height, left : left + panel_width] = video
    return frames


def _three_frames(video: Video, gap: int) -> Video:
    """Put the first, middle and last frame beside each other: (height, 3·width + 2·gap, 3)."""
    frames = drawing.enlarge(video[[0, (len(video) - 1) // 2, len(video) - 1]], CELL_WIDTH)
    space = np.full((frames.shape[1], gap, 3), drawing.BACKGROUND, dtype=np.uint8)
    return np.concatenate([frames[0], space, frames[1], space, frames[2]], axis=1)


def _draw_verdicts(
    draw: ImageDraw.ImageDraw, column: Column, index: int, place: tuple[int, int], size: int, max_width: int
) -> None:
    left, top = place
    end = left + max_width
    for verdict in column.verdicts[index] if column.verdicts else ():
        if verdict.good is not None:
            drawing.draw_mark(draw, (left, top + size // 6), int(size * 0.8), verdict.good)
            left += int(size * 1.2)
        color = drawing.FAINT if verdict.good is None else drawing.GOOD if verdict.good else drawing.BAD
        drawing.draw_text(draw, (left, top), verdict.words, size, end - left, color)
        left += int(draw.textlength(verdict.words, font=drawing.font(size))) + size


def _check(columns: Sequence[Column], texts: Sequence[str]) -> None:
    if not columns or not texts:
        raise ModelError("there is no video to show.")
    for column in columns:
        shapes = {video.shape for video in column.videos} | {video.shape for video in columns[0].videos}
        if len(column.videos) != len(texts) or len(shapes) != 1:
            raise ModelError(f"{column.title!r} needs {len(texts)} videos of one shape, not {sorted(shapes)}.")
