import json

import pytest
from PIL import Image

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets import BenchmarkSet, Item, Overlap, Skipped, load_benchmark, select
from tempoquant.evaluate.benchmark_sets.bundled import NUM_ITEMS

IMAGE = Image.new("RGB", (4, 4))
ITEMS = tuple(Item(f"i{number}", f"prompt {number}", IMAGE, f"hash{number}") for number in range(5))
SET = BenchmarkSet("some", ITEMS, (Skipped("bad", "it has no prompt."),))
BY_ID = [{"id": "i1", "prompt": "another", "image_sha256": "another"}]
BY_CONTENT = [{"id": "x", "prompt": "prompt 3", "image_sha256": "hash3"}]


def ids(selection):
    return [item.id for item in selection.items]


@pytest.mark.parametrize(("calibrated", "id"), [(BY_ID, "i1"), (BY_CONTENT, "i3")])
def test_an_item_that_was_calibrated_on_is_refused_left_out_or_allowed(calibrated, id):
    with pytest.raises(CalibrationError, match=f"1 of 5 items were calibrated on, such as '{id}'.*--exclude-overlap"):
        select(SET, calibrated)
    excluded = select(SET, calibrated, overlap=Overlap.EXCLUDE)
    assert (id in ids(excluded), excluded.excluded, excluded.overlap) == (False, (id,), ())
    allowed = select(SET, calibrated, overlap=Overlap.ALLOW)
    assert (len(allowed.items), allowed.overlap, allowed.excluded) == (5, (id,), ())


@pytest.mark.parametrize("record", [{"id": "x", "prompt": "prompt 3", "image_sha256": "hash2"}])
def test_the_same_prompt_with_another_image_is_no_overlap(record):
    assert len(select(SET, [record]).items) == 5


def test_overlap_beyond_the_limit_does_not_matter_and_excluded_items_make_room():
    assert ids(select(SET, BY_CONTENT, limit=2)) == ["i0", "i1"]
    assert ids(select(SET, BY_ID, limit=2, overlap=Overlap.EXCLUDE)) == ["i0", "i2"]


def test_ids_choose_items_and_keep_the_benchmarks_order():
    assert ids(select(SET, [], ids=["i4", "i0"])) == ["i0", "i4"]


@pytest.mark.parametrize(("id", "why"), [("nobody", "is none of its items"), ("bad", "was skipped: it has no prompt")])
def test_ids_that_cannot_be_had_are_an_error(id, why):
    with pytest.raises(CalibrationError, match=why):
        select(SET, [], ids=["i0", id])


def test_a_benchmark_of_which_nothing_is_left_is_an_error():
    calibrated = [{"id": item.id, "prompt": "", "image_sha256": ""} for item in ITEMS]
    with pytest.raises(CalibrationError, match="no item of some is left"):
        select(SET, calibrated, overlap=Overlap.EXCLUDE)


def test_the_bundled_set_is_as_large_as_it_is_asked_to_be():
    assert len(load_benchmark("tiny", None, 1.0).items) == NUM_ITEMS
    assert len(load_benchmark("tiny", None, 1.0, 30).items) == 30


def test_a_jsonl_is_a_benchmark_and_a_mistake_in_it_an_error(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"id": "one/two", "image": "a.png", "prompt": "p"}))
    [item] = load_benchmark(str(file), None, 1.0).items
    assert (item.id, item.text, item.prompt().image.size) == ("one/two", "p", (4, 4))
    file.write_text(json.dumps({"id": "x", "image": "b.png", "prompt": "p"}))
    with pytest.raises(CalibrationError, match=r"mine\.jsonl, line 1: there is no image"):
        load_benchmark(str(file), None, 1.0)


@pytest.mark.parametrize(("name", "root", "words"), [("opens2v", False, "--root"), ("tiny", True, "leave it out"),
                                                     ("nothing", False, "no prompt file")])  # fmt: skip
def test_names_and_roots_that_do_not_go_together_are_refused(tmp_path, name, root, words):
    with pytest.raises(CalibrationError, match=words):
        load_benchmark(name, tmp_path if root else None, 1.0)
