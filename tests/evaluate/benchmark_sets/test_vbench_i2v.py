import json

import pytest
from PIL import Image

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets.vbench_i2v import INFO, load_vbench_i2v

STILL = {"prompt_en": "a red wall", "dimension": ["i2v_background"], "image_type": "indoor",
         "image_name": "a red wall.jpg"}  # fmt: skip
MOVING = {"prompt_en": "a red wall, camera pans left", "dimension": ["camera_motion"], "image_type": "indoor"}


@pytest.fixture
def root(tmp_path):
    for ratio, size in {"1-1": (40, 40), "16-9": (64, 36)}.items():
        folder = tmp_path / "data" / "crop" / ratio
        folder.mkdir(parents=True)
        Image.new("RGB", size, "red").save(folder / "a red wall.jpg")
    return tmp_path


def load(root, entries, aspect_ratio=16 / 9):
    (root / INFO).write_text(json.dumps(entries))
    return load_vbench_i2v(root, aspect_ratio)


def test_camera_motions_use_the_image_of_the_prompt_they_extend(root):
    found = load(root, [STILL, MOVING])
    assert [item.text for item in found.items] == ["a red wall", "a red wall, camera pans left"]
    assert {item.image.name for item in found.items} == {"a red wall.jpg"}
    assert found.items[0].category == "indoor"


@pytest.mark.parametrize(("aspect_ratio", "folder"), [(832 / 480, "16-9"), (1.0, "1-1")])
def test_images_are_those_of_the_nearest_aspect_ratio(root, aspect_ratio, folder):
    # 832 × 480 is nearest to 7-4, so that has to be there to be chosen
    (root / "data" / "crop" / "7-4").mkdir()
    Image.new("RGB", (70, 40), "red").save(root / "data" / "crop" / "7-4" / "a red wall.jpg")
    [item] = load(root, [STILL], aspect_ratio).items
    assert item.image.parent.name == {"16-9": "7-4"}.get(folder, folder)


def test_repeated_and_unusable_entries_are_skipped_with_the_reason(root):
    found = load(root, [STILL, STILL, {**STILL, "image_name": "none.jpg"}, {"image_name": "a red wall.jpg"},
                        {**STILL, "image_name": "../x.jpg"}])  # fmt: skip
    assert len(found.items) == 1
    words = ("image and prompt of vbench-i2v-0000", "no image none.jpg", "no prompt_en", "outside the folder")
    assert all(word in skip.why for word, skip in zip(words, sorted(found.skipped, key=lambda s: s.id), strict=True))


@pytest.mark.parametrize("content", [None, "{}", "["])
def test_a_missing_or_foreign_info_file_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / INFO).write_text(content)
    with pytest.raises(CalibrationError, match=INFO):
        load_vbench_i2v(tmp_path, 1.0)
