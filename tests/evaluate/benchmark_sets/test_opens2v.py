import json

import pytest

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets import load_benchmark
from tempoquant.evaluate.benchmark_sets.opens2v import load_opens2v
from tests import opens2v_tree as tree


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tree.write_tree(tmp_path_factory.mktemp("OpenS2V-Eval"))


def test_every_usable_item_is_found_once_in_the_files_order(root):
    found = load_opens2v(root)
    assert [item.id for item in found.items] == [f"{name}_{number}" for name in tree.CATEGORIES for number in (1, 2)]
    assert [item.category for item in found.items[::2]] == list(tree.CATEGORIES)


def test_what_is_skipped_is_named_with_its_reason(root):
    why = {skip.id: skip.why for skip in load_opens2v(root).skipped}
    assert set(why) == {tree.BROKEN, tree.MISSING, tree.NO_PROMPT, tree.OUTSIDE, tree.TWICE}
    assert "cannot be read as an image" in why[tree.BROKEN]
    assert "there is no image" in why[tree.MISSING]
    assert "no prompt" in why[tree.NO_PROMPT]
    assert "outside the folder" in why[tree.OUTSIDE]
    assert "occurs twice in Open-Domain_Eval.json" in why[tree.TWICE]


def test_of_an_id_that_stands_twice_the_first_entry_counts(root):
    [item] = [item for item in load_opens2v(root).items if item.id == tree.TWICE]
    assert item.text == "The thing number 1 of singleobj turns slowly."


def test_synthesis_flags_are_read_however_they_are_spelled(root):
    assert [item.synthetic for item in load_opens2v(root).items[:10:2]] == list(tree.SPELLINGS.values())


def test_the_first_of_several_images_is_the_first_frame(root):
    found = load_opens2v(root)
    [item] = [item for item in found.items if item.id == "singleobj_2"]
    assert item.image == root / "Images/singleobj/thing/2.jpg"  # the second one is not even there
    assert any(note.startswith(f"{tree.NUM_SEVERAL} items have several") for note in found.notes)


def test_a_file_that_contradicts_the_largest_one_is_not_believed(root, tmp_path):
    copy = tree.write_tree(tmp_path)
    file = copy / "Human-Domain_Eval.json"
    records = json.loads(file.read_text())
    records["singleface_1"]["prompt"] = "Something else."
    file.write_text(json.dumps(records))
    found = load_opens2v(copy)
    assert {skip.id: skip.why for skip in found.skipped}["singleface_1"].startswith("Human-Domain_Eval.json differs")
    assert [i.text for i in found.items if i.id == "singleface_1"] == ["The thing number 1 of singleface turns slowly."]


def test_one_file_alone_is_enough(root):
    assert len(load_opens2v(root / "Human-Domain_Eval.json").items) == 4


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "{", '"x"'])
def test_a_file_of_another_format_is_an_error(tmp_path, text):
    (tmp_path / "Open-Domain_Eval.json").write_text(text)
    with pytest.raises(CalibrationError, match=r"Open-Domain_Eval\.json"):
        load_opens2v(tmp_path)


def test_a_folder_without_the_json_says_what_to_give(tmp_path):
    with pytest.raises(CalibrationError, match="give the folder of OpenS2V-Eval"):
        load_opens2v(tmp_path)


def test_a_benchmark_without_one_usable_item_says_why(tmp_path):
    record = {"img_paths": ["Images/a.png"], "prompt": "p"}
    (tmp_path / "Open-Domain_Eval.json").write_text(json.dumps({"singleobj_1": record}))
    with pytest.raises(CalibrationError, match=r"no usable item: singleobj_1, for example: .*there is no image"):
        load_benchmark("opens2v", tmp_path, 1.0)
