"""Evaluating on prompts without images: a text-to-video pipeline does, and what needs an image
refuses or skips.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tempoquant.errors import CalibrationError, SettingsError
from tempoquant.evaluate import evaluation, generation
from tempoquant.evaluate.benchmark_sets import BenchmarkSet, Item, fitting, load_benchmark
from tempoquant.evaluate.evaluation import evaluate
from tempoquant.evaluate.plan import Model
from tempoquant.evaluate.request import Request
from tempoquant.evaluate.vbench.scores import score_missing
from tempoquant.evaluate.vbench.settings import VBenchSettings
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.progress import SILENT
from tempoquant.quantizing import quantize
from tempoquant.report.build import build_report
from tests import opens2v_tree as tree
from tests.conditioned import write_prompts
from tests.evaluate.vbench_folder import LABELS, plan_of, write_takes
from tests.recorded import CPU, SETTINGS, SOURCE
from tests.wan_pipelines import write


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return OpenS2V-Eval's list of prompts, and no picture."""
    return tree.write_tree(tmp_path_factory.mktemp("OpenS2V-Eval")) / "Human-Domain_Eval.json"


@pytest.fixture(scope="module")
def found(tmp_path_factory, root):
    """Return the evaluation of a text-to-video pipeline and its rounded copy on two prompts."""
    folder = tmp_path_factory.mktemp("models")
    source = SourceModel.open(write(folder / "source", "wan21_t2v"))
    rounded = SourceModel.open(quantize(source.folder, folder / "rtn", "rtn", device="cpu"))
    benchmark = load_benchmark("opens2v", root, 1.0, with_images=False)
    request = Request(Model("16-bit", source), [Model("rtn", rounded)], benchmark, default_settings(source), limit=2)
    return SimpleNamespace(record=evaluate(request, folder / "out", CPU), out=folder / "out", request=request)


def test_every_video_is_made_and_measured_and_no_first_frame_is_written(found):
    items = found.record["items"]
    assert [item["id"] for item in items] == ["singlehuman_1", "singlehuman_2"]
    for item in items:
        assert item["image"] is None and item["failed"] == {}
        assert item["videos"].keys() == item["metrics"].keys() == {"16-bit", "rtn"}
    assert not (found.out / "items").exists()
    assert any("without their images" in note for note in found.record["notes"])


def test_the_report_shows_no_picture(found, tmp_path):
    build_report([found.out], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "The thing number 1 of singlehuman" in page and "data:image" not in page


def test_a_prompt_without_its_image_is_known_from_calibration(found, monkeypatch):
    calibrated = [{"id": "other", "prompt": found.record["items"][0]["prompt"], "image_sha256": "0" * 64}]
    monkeypatch.setattr(evaluation, "calibration_prompts_of", lambda _: calibrated)
    with pytest.raises(CalibrationError, match="calibrated on, such as 'singlehuman_1'"):
        evaluate(found.request, found.out, CPU)


def test_a_downloaded_benchmark_without_images_is_a_list_of_prompts(root, tmp_path):
    (tmp_path / "info.json").write_text(
        json.dumps([{"prompt_en": "a wall", "dimension": []}, {"prompt_en": "a wall"}, {"prompt_en": "a sea"}])
    )
    texts = load_benchmark("vbench-i2v", tmp_path / "info.json", 1.0, with_images=False)
    assert [(item.text, item.image) for item in texts.items] == [("a wall", None), ("a sea", None)]
    assert [skip.why for skip in texts.skipped] == ["it has the prompt of vbench-i2v-0000."]
    with_broken = load_benchmark("opens2v", root.parent / "Open-Domain_Eval.json", 1.0, with_images=False)
    assert {item.id for item in with_broken.items} > {tree.BROKEN, tree.MISSING, tree.OUTSIDE}
    assert {skip.id for skip in with_broken.skipped} == {tree.NO_PROMPT, tree.TWICE}


def test_a_list_of_ones_own_that_lacks_an_image_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "load_in_mode", lambda *_: pytest.fail("a model was loaded"))
    own = load_benchmark(str(write_prompts(tmp_path, ())), None, 1.0)
    request = Request(Model("16-bit", SOURCE), [Model("again", SOURCE)], own, SETTINGS)
    with pytest.raises(CalibrationError, match=r"3 of 3 items .* lack what the model needs, .* lacks an image"):
        evaluate(request, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_of_a_benchmark_what_lacks_something_is_skipped_with_the_reason():
    items = tuple(Item(id, "text", None, "") for id in ("a", "b"))
    benchmark = BenchmarkSet("opens2v", items)
    found = fitting(benchmark, lambda item: "a pose clip" if item.id == "a" else None)
    assert found.items == items[1:]
    assert [(skip.id, skip.why) for skip in found.skipped] == [("a", "the model needs a pose clip, and it has none.")]
    with pytest.raises(CalibrationError, match="2 of 2 items of opens2v lack"):
        fitting(benchmark, lambda _: "an image")


def test_vbench_compares_no_video_with_an_image_that_is_not_there(tmp_path, monkeypatch):
    settings = VBenchSettings(tmp_path / "python")
    assert set(settings.dimensions) - set(settings.without_images().dimensions) == {"i2v_subject", "i2v_background"}
    with pytest.raises(SettingsError, match="i2v_subject of VBench compare a video with the image"):
        VBenchSettings(tmp_path / "python", ("i2v_subject",)).without_images()

    asked = []
    monkeypatch.setattr(
        "tempoquant.evaluate.vbench.scores.answers_of",
        lambda _vbench, dimension, videos, _log: (asked.append((dimension, videos)), (answer for answer in ()))[1],
    )
    plan = plan_of({"one": "A cup.", "two": "A sea."})
    plan.items[1] = Item("two", "A sea.", None, "")
    takes = plan.takes
    plan.takes = lambda label: [(plan.items[place], take) for place, (_, take) in enumerate(takes(label))]
    vbench = SimpleNamespace(
        settings=VBenchSettings(tmp_path, ("i2v_subject", "imaging_quality")), made_with=lambda _: "made"
    )
    score_missing(write_takes(tmp_path / "out", ["one", "two"]), plan, LABELS, vbench, SILENT)
    assert [len(videos) for _, videos in asked] == [2, 4]
    assert [["image" in video for video in videos] for _, videos in asked] == [[True] * 2, [True, False] * 2]
