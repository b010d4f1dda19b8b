import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from tempoquant.errors import ModelError
from tempoquant.evaluate.drawing import enlarge
from tempoquant.evaluate.side_by_side import (
    PLAYS,
    Column,
    Verdict,
    contact_sheet,
    write_contact_sheet,
    write_side_by_side,
)

TEXTS = ["a red circle moves left slowly", "a text so long that it does not fit into any picture" * 9]
COLORS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]


def column(title: str, color: tuple[int, int, int], **changes: object) -> Column:
    videos = [np.full((5, 16, 16, 3), color, np.uint8) for _ in TEXTS]
    return Column(title, "4.25 bits per weight", videos, **changes)


COLUMNS = [column("16-bit", COLORS[0]), column("rtn", COLORS[1]), column("paper", COLORS[2])]


def test_enlarging_repeats_pixels_and_never_shrinks():
    video = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert enlarge(video, 13).shape == (2, 12, 12, 3)
    assert (enlarge(video, 13)[:, ::3, ::3] == video).all()
    assert enlarge(video, 2).shape == video.shape


def test_the_video_shows_every_model_beside_the_others_from_left_to_right(tmp_path):
    write_side_by_side(tmp_path / "a.mp4", COLUMNS, TEXTS, 8)
    frames = list(imageio.get_reader(tmp_path / "a.mp4").iter_data())
    assert len(frames) == PLAYS * 5 * len(TEXTS)
    assert all(length % 2 == 0 for length in frames[0].shape[:2])
    middle = frames[0][frames[0].shape[0] // 2].astype(int)
    thirds = np.array_split(middle, 3)
    for third, color in zip(thirds, COLORS, strict=True):
        assert np.abs(third[len(third) // 2] - color).max() < 12


def test_the_contact_sheet_shows_first_middle_and_last_frame(tmp_path):
    video = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (40, 50, 130, 150, 220)])
    picture = np.asarray(contact_sheet([Column("rtn", "", [video])], ["text"]))
    row = picture[len(picture) * 2 // 3, :, 0]
    shown = [int(value) for value in row if value != 255]
    assert sorted(set(shown), key=shown.index) == [40, 130, 220]


def test_the_contact_sheet_is_a_png_of_readable_width(tmp_path):
    write_contact_sheet(tmp_path / "a.png", COLUMNS, TEXTS)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert 1500 <= picture.width <= 2500


def test_verdicts_are_drawn_in_their_colour():
    good, bad = ([[Verdict("motion", value)]] * len(TEXTS) for value in (True, False))
    pictures = [
        np.asarray(contact_sheet([column("rtn", COLORS[2], verdicts=v)], TEXTS)).astype(int) for v in (good, bad)
    ]
    green, red = ((p[..., 1] - p[..., 0] > 80).sum() - (p[..., 0] - p[..., 1] > 80).sum() for p in pictures)
    assert green > 0 > red


def test_large_videos_are_not_enlarged(tmp_path):
    wide = Column("16-bit", "", [np.zeros((1, 90, 700, 3), np.uint8)])
    write_side_by_side(tmp_path / "a.mp4", [wide], ["text"], 8)
    assert 700 <= imageio.get_reader(tmp_path / "a.mp4").get_data(0).shape[1] < 800


@pytest.mark.parametrize("columns", [[], [Column("rtn", "", COLUMNS[0].videos[:1])]])
def test_a_missing_video_is_an_error(tmp_path, columns):
    with pytest.raises(ModelError):
        write_contact_sheet(tmp_path / "a.png", columns, TEXTS)
    assert not (tmp_path / "a.png").exists()
