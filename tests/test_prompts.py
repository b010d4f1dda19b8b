"""Prompts: read with errors that name the line, and kept apart between calibration and
evaluation.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from tempoquant.errors import CalibrationError
from tempoquant.prompts import Prompt, check_disjoint, load_prompts, open_image, provenance


def image(color: str = "red", size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image().save(tmp_path / "red.png")
    (tmp_path / "pictures").mkdir()
    image("blue").save(tmp_path / "pictures" / "blue.png")
    return tmp_path


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_a_file_gives_prompts_in_order_with_images_relative_to_it(folder: Path):
    file = write_lines(
        folder / "set.jsonl",
        {"id": "one", "image": "red.png", "prompt": "a red square grüßt"},
        "",
        {"image": "pictures/blue.png", "prompt": "a blue square"},
    )
    prompts = load_prompts(file)
    assert [(p.id, p.text) for p in prompts] == [("one", "a red square grüßt"), ("set-3", "a blue square")]
    assert prompts[0].image.tobytes() == image().tobytes() and prompts[0].image.mode == "RGB"
    assert prompts[1].image_hash == Prompt("x", image("blue"), "y").image_hash


def test_a_prompt_may_bring_a_video_relative_to_its_file(folder: Path):
    (folder / "clip.mp4").write_bytes(b"")
    line = {"image": "red.png", "prompt": "x", "video": "clip.mp4"}
    assert [p.video for p in load_prompts(write_lines(folder / "set.jsonl", line))] == [folder / "clip.mp4"]
    missing = write_lines(folder / "set.jsonl", {**line, "video": "gone.mp4"})
    with pytest.raises(CalibrationError, match=r"line 1: there is no video .*gone\.mp4"):
        load_prompts(missing)


def test_a_prompt_may_be_a_text_alone(folder: Path):
    file = write_lines(folder / "set.jsonl", {"prompt": "rain"}, {"id": "b", "prompt": "snow", "image": None})
    assert [(p.id, p.text, p.image, p.image_hash) for p in load_prompts(file)] == [
        ("set-1", "rain", None, ""), ("b", "snow", None, ""),
    ]  # fmt: skip


def test_a_prompt_may_bring_clips_relative_to_its_file(folder: Path):
    (folder / "walk.mp4").write_bytes(b"")
    line = {"image": "red.png", "prompt": "x", "pose": "walk.mp4", "face": "pictures"}
    [prompt] = load_prompts(write_lines(folder / "set.jsonl", line))
    assert prompt.clips == {"pose": folder / "walk.mp4", "face": folder / "pictures"} and prompt.video is None


def test_a_prompt_may_hold_any_character_and_the_file_a_byte_order_mark(folder: Path):
    text = "a\u2028b\x0bc\u0085d"
    file = folder / "set.jsonl"
    file.write_text(json.dumps({"image": "red.png", "prompt": text}, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert [p.text for p in load_prompts(file)] == [text]


def test_a_folder_gives_the_prompts_of_all_its_files(folder: Path):
    write_lines(folder / "b.jsonl", {"image": "red.png", "prompt": "second"})
    write_lines(folder / "a.jsonl", {"image": "red.png", "prompt": "first"})
    assert [p.text for p in load_prompts(folder)] == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "gone.png", "prompt": "x"}', "gone.png"),
        ('{"image": "set.jsonl", "prompt": "x"}', "cannot be read as an image"),
        ('{"image": "pictures", "prompt": "x"}', "cannot be read as an image"),
        ('{"image": "red.png"}', "prompt"),
        ('{"prompt": "x", "pose": 3}', "not a JSON object"),
        ('{"prompt": "x", "face": "gone.mp4"}', "there is no face"),
        ('{"image": "red.png", "prompt": 3}', "prompt is not a text"),
        ('{"image": 3, "prompt": "x"}', "not a JSON object"),
        ('{"image": "red.png", "prompt": "x"', "not a JSON object"),
        ('["red.png", "x"]', "not a JSON object"),
        ('"red.png"', "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"image": "a\\u0000b.png", "prompt": "x"}', "cannot be read as an image"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(folder: Path, line: str, words: str):
    file = write_lines(folder / "set.jsonl", {"image": "red.png", "prompt": "fine"}, line)
    with pytest.raises(CalibrationError) as caught:
        load_prompts(file)
    assert "set.jsonl, line 2" in str(caught.value) and words in str(caught.value)


def test_a_file_that_is_not_utf_8_is_named(folder: Path):
    (folder / "set.jsonl").write_bytes(b'{"image": "red.png", "prompt": "\xff"}')
    with pytest.raises(CalibrationError, match=r"set\.jsonl"):
        load_prompts(folder / "set.jsonl")


@pytest.mark.parametrize("keep", [20, 45])
def test_a_truncated_image_is_named(folder: Path, keep: int):
    whole = (folder / "red.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:keep])
    with pytest.raises(CalibrationError, match=r"cut\.png cannot be read as an image"):
        open_image(folder / "cut.png")


def test_an_altered_image_gives_an_image_or_a_named_error(folder: Path):
    whole = (folder / "red.png").read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        (folder / "damaged.png").write_bytes(damaged)
        try:
            open_image(folder / "damaged.png")
        except CalibrationError as error:
            assert "damaged.png" in str(error)


def test_ids_used_twice_are_refused_across_files_too(folder: Path):
    write_lines(folder / "a.jsonl", {"id": "same", "image": "red.png", "prompt": "x"})
    write_lines(folder / "b.jsonl", {"id": "same", "image": "red.png", "prompt": "y"})
    with pytest.raises(CalibrationError, match="'same' twice"):
        load_prompts(folder)


def test_nothing_to_read_is_an_error(folder: Path):
    with pytest.raises(CalibrationError, match="no prompt file"):
        load_prompts(folder / "gone.jsonl")
    with pytest.raises(CalibrationError, match=r"no \.jsonl file"):
        load_prompts(folder / "pictures")
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(CalibrationError, match="holds no prompts"):
        load_prompts(folder / "empty.jsonl")


def test_a_missing_single_image_is_named(tmp_path: Path):
    with pytest.raises(CalibrationError, match=r"gone\.png"):
        open_image(tmp_path / "gone.png")


def test_a_re_encoded_copy_has_the_same_hash_and_another_size_does_not(tmp_path: Path):
    image().save(tmp_path / "copy.bmp")
    copy = Prompt("copy", open_image(tmp_path / "copy.bmp"), "x")
    assert copy.image_hash == Prompt("original", image(), "y").image_hash
    assert copy.image_hash != Prompt("turned", image(size=(6, 8)), "x").image_hash


def test_overlap_is_found_by_id_and_by_image_and_text():
    calibrated = provenance([Prompt("seen", image(), "a red square")])
    with pytest.raises(CalibrationError, match=r"1 evaluation prompt.*'seen'"):
        check_disjoint([Prompt("new", image("blue"), "a"), Prompt("seen", image("green"), "b")], calibrated)
    with pytest.raises(CalibrationError, match="'renamed'"):
        check_disjoint([Prompt("renamed", image(), "a red square")], calibrated)


def test_the_same_image_with_another_text_or_the_same_text_with_another_image_is_no_overlap():
    calibrated = provenance([Prompt("seen", image(), "a red square")])
    check_disjoint([Prompt("a", image(), "another text"), Prompt("b", image("blue"), "a red square")], calibrated)
    check_disjoint([], calibrated)
    check_disjoint([Prompt("a", image(), "x")], [])


def test_without_an_image_the_text_alone_decides_about_overlap():
    of_text, of_image = (provenance([Prompt("seen", each, "rain")]) for each in (None, image()))
    assert of_text == [{"id": "seen", "prompt": "rain", "image_sha256": ""}]
    for calibrated in (of_text, of_image):
        with pytest.raises(CalibrationError, match="'new'"):
            check_disjoint([Prompt("new", None, "rain")], calibrated)
        check_disjoint([Prompt("new", None, "snow")], calibrated)
    with pytest.raises(CalibrationError, match="'new'"):
        check_disjoint([Prompt("new", image("blue"), "rain")], of_text)
