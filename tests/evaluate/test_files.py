import imageio.v2 as imageio
import numpy as np
import pytest

from tempoquant.errors import OutputError
from tempoquant.evaluate import files
from tempoquant.evaluate.files import check_place, read_lossless, whole_file, write_lossless, write_mp4, write_text


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "a.txt"
    write_text(place, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(place) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert place.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [place]


def test_a_finished_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    place = tmp_path / "a.txt"
    write_text(place, "old")
    write_text(place, "new\n")
    assert place.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("name", ["folder.mp4", "missing/a.mp4", "a.gif"])
def test_a_place_that_cannot_take_an_mp4_is_refused_beforehand(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OutputError):
        check_place(tmp_path / name, ".mp4")


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_a_video_is_readable_everywhere_and_has_all_frames(tmp_path, size):
    video = np.zeros((5, *size, 3), np.uint8)
    video[:, :, : size[1] // 2] = (200, 30, 30)
    write_mp4(tmp_path / "a.mp4", video, 8)
    reader = imageio.get_reader(tmp_path / "a.mp4")
    frames = list(reader.iter_data())
    metadata = reader.get_meta_data()
    assert (metadata["codec"], metadata["pix_fmt"][:7], metadata["fps"]) == ("h264", "yuv420p", 8)
    assert len(frames) == 5
    assert all(length % 2 == 0 for length in frames[0].shape[:2])
    decoded = np.stack(frames)[:, : size[0], : size[1]].astype(int)
    inside = np.abs(decoded - video)[:, :, [5, -6]]  # away from the edge, where chroma is shared by four pixels
    assert inside.max() <= 8


def test_a_failing_encoder_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("[Errno 32] Broken pipe\n\nFFMPEG COMMAND:\nmany things\n")

    monkeypatch.setattr(files.imageio, "get_writer", fail)
    with pytest.raises(
        OutputError, match=r"a.mp4 could not be encoded \(\[Errno 32\] Broken pipe\); .* MiB are free there"
    ):
        write_mp4(tmp_path / "a.mp4", np.zeros((1, 16, 16, 3), np.uint8), 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(1, 16, 16, 3), (5, 32, 48, 3), (17, 33, 47, 3)])
def test_lossless_clips_come_back_bit_by_bit(tmp_path, shape):
    video = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_lossless(tmp_path / "a.mkv", video, 16)
    found = read_lossless(tmp_path / "a.mkv")
    assert found.dtype == np.uint8 and np.array_equal(found, video)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mkv"]


def test_a_damaged_clip_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.mkv").write_bytes(b"nothing")
    with pytest.raises(OutputError, match=r"a\.mkv cannot be read"):
        read_lossless(tmp_path / "a.mkv")
