"""A whole evaluation on OpenS2V-Eval's format: the bundled model and its rounded copy, small
videos, two steps.
"""

import functools
import json
import statistics
from types import SimpleNamespace

import pytest
from PIL import Image

from tempoquant.acceleration.cache_settings import CacheSettings
from tempoquant.acceleration.choices import Choices
from tempoquant.errors import CalibrationError, DeviceError, ModelError, OutputError, SettingsError
from tempoquant.evaluate import generation
from tempoquant.evaluate.benchmark_sets import BenchmarkSet, Item, Overlap
from tempoquant.evaluate.benchmark_sets.opens2v import load_opens2v
from tempoquant.evaluate.evaluation import evaluate
from tempoquant.evaluate.plan import Model
from tempoquant.evaluate.request import Request
from tempoquant.models.source import SourceModel
from tempoquant.quantizing import quantize
from tempoquant.runtime.activation_bits import set_activation_bits
from tests import opens2v_tree as tree
from tests.recorded import CPU, SETTINGS, SOURCE

FAILING = "humanobj_2"
STEPS = SETTINGS.replace(num_steps=2)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    return SourceModel.open(quantize("tiny", tmp_path_factory.mktemp("models") / "rtn", "rtn", device="cpu"))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return load_opens2v(tree.write_tree(tmp_path_factory.mktemp("OpenS2V-Eval")))


@pytest.fixture(scope="module")
def request_of(rounded, benchmark):
    eight = functools.partial(set_activation_bits, bits=8)
    return functools.partial(
        Request,
        Model("16-bit", SOURCE),
        [Model("rtn", rounded), Model("rtn-a8", rounded, "8", eight)],
        benchmark,
        STEPS,
    )


@pytest.fixture(scope="module")
def found(request_of, tmp_path_factory):
    """Return the evaluation of seven items, on one of which the rounded model fails."""
    original = generation.generate_video
    calls = []

    def failing(pipeline, prompt, *arguments, **named):
        calls.append(prompt.id)
        if prompt.id == FAILING and calls.count(FAILING) == 2:
            raise RuntimeError("out of memory, say")
        return original(pipeline, prompt, *arguments, **named)

    out = tmp_path_factory.mktemp("evaluation") / "out"
    wanted = ["singleobj_1", "singleobj_2", "singlehuman_1", "singleface_1", "multiobject_1", "humanobj_1", FAILING]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate_video", failing)
        record = evaluate(request_of(ids=wanted), out, CPU)
    return SimpleNamespace(record=record, out=out, calls=calls, ids=wanted)


def test_a_speed_is_a_row_of_its_own_that_says_so(rounded, benchmark, tmp_path):
    choices = Choices("exact", asked_cache=CacheSettings("firstblock", threshold=10.0))
    models = [Model("rtn", rounded), Model("rtn-exact", rounded, speed=choices)]
    steps = SETTINGS.replace(num_steps=4)
    record = evaluate(Request(Model("16-bit", SOURCE), models, benchmark, steps, limit=1), tmp_path / "out", CPU)
    _, plain, cached = record["models"]
    assert plain["speed"] is plain["acceleration"] is None and plain["maps"] is not None
    assert cached["speed"] == "exact: firstblock (threshold 10)" and cached["maps"] is None
    skipped = [calls["skipped"] for calls in cached["acceleration"]["calls"].values()]
    assert all(each > 0 for each in skipped)
    means = {row["label"]: row["mean"] for row in record["summary"] if row["metric"] == "final_latent_db"}
    assert means["rtn-exact"] < means["rtn"]
    assert any("rtn-exact generates at another speed" in note for note in record["notes"])


def manifest(found):
    return [json.loads(line) for line in (found.out / "manifest.jsonl").read_text().splitlines()]


def rows(found, metric, label):
    return [row for row in found.record["summary"] if (row["metric"], row["label"]) == (metric, label)]


def test_the_file_is_what_was_returned_and_has_no_nan(found):
    text = (found.out / "evaluation.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(found.record))
    assert "NaN" not in text and "Infinity" not in text


def test_everything_the_record_names_is_there(found):
    for item in found.record["items"]:
        with Image.open(found.out / item["image"]) as picture:
            assert picture.size == (32, 32)
        assert all((found.out / video).stat().st_size for video in item["videos"].values())


def test_skipped_entries_are_reported_with_their_reasons(found):
    skipped = {skip["id"] for skip in found.record["benchmark"]["skipped"]}
    assert skipped == {tree.BROKEN, tree.MISSING, tree.NO_PROMPT, tree.OUTSIDE, tree.TWICE}


def test_a_failed_item_is_noted_and_stops_nothing_else(found):
    failed = {item["id"]: item["failed"] for item in found.record["items"] if item["failed"]}
    assert failed == {FAILING: {"rtn": "RuntimeError: out of memory, say"}}
    by_label = {label: rows(found, "temporal_flickering", label)[0]["n"] for label in ("16-bit", "rtn", "rtn-a8")}
    assert by_label == {"16-bit": 7, "rtn": 6, "rtn-a8": 7}


def test_paired_metrics_have_a_difference_and_distances_have_none(found):
    [row] = rows(found, "temporal_flickering", "rtn")
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["mean"] - row["reference_mean"] == pytest.approx(row["difference"])
    assert row["within_noise"] == (row["low"] <= 0 <= row["high"]) == ("within noise" in row["words"])
    [row] = rows(found, "psnr_db", "rtn")
    assert row["difference"] is row["within_noise"] is None
    assert row["low"] <= row["mean"] <= row["high"]
    assert rows(found, "psnr_db", "16-bit") == []


def test_eight_bit_activations_are_nearer_to_the_reference(found):
    [row] = [p for p in found.record["pairs"] if p["metric"] == "final_latent_db"]
    assert (row["first"], row["second"], row["within_noise"]) == ("rtn", "rtn-a8", False)
    assert row["low"] > 0
    assert [model["activation_bits"] for model in found.record["models"]] == [None, "4", "8"]


def test_the_final_latent_is_that_of_the_cleanest_bin(found):
    metrics = found.record["items"][0]["metrics"]["rtn"]
    assert metrics["final_latent_db"] == metrics["sqnr_db"]["low_noise bin 0"]
    assert len(metrics["sqnr_db"]) == 2  # one step of each denoiser


def test_layer_maps_show_every_quantized_linear_of_both_experts(found):
    maps = found.record["models"][1]["maps"]
    assert set(maps) == {"high_noise", "low_noise"}
    assert (maps["high_noise"]["bins"], maps["low_noise"]["bins"]) == ([[900.0, 1000.0]], [[0.0, 900.0]])
    for found_map in maps.values():
        assert len(found_map["error_db"]) == len(found_map["layers"]) == len(found_map["clip_ratio"]) >= 40
        assert all(-60 < row[0] < 0 for row in found_map["error_db"])
        assert all(row == [1.0] for row in found_map["clip_ratio"])  # rtn clips nothing
    assert found.record["models"][0]["maps"] is None


def test_costs_and_provenance_are_there(found):
    reference, model, _ = found.record["models"]
    assert 0 < model["seconds_per_step"] < 60
    assert model["memory"]["peak_gpu_gib"] is None
    of_items = [line["seconds_per_step"] for line in manifest(found) if line["label"] == "rtn" and "failed" not in line]
    seconds, ratio = model["costs"]["seconds_per_step"], model["costs"]["seconds_per_step_ratio"]
    assert (seconds["median"], seconds["n"]) == (statistics.median(of_items), 6)
    assert seconds["low"] <= seconds["median"] <= seconds["high"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert reference["costs"]["seconds_per_step_ratio"] is None
    assert any("other work slows" in note for note in found.record["notes"])
    assert (reference["bits_per_weight"], reference["recipe"]) == (16.0, None)
    assert model["recipe"]["name"] == "rtn"
    assert model["kernels"] == {"mxfp4": "reference"}


def test_notes_say_what_vmaf_is_worth_at_this_size(found):
    assert any("not meaningful under 200 pixels" in note for note in found.record["notes"])


def test_the_next_run_makes_up_for_the_failure_and_generates_nothing_else(found, request_of, monkeypatch):
    calls = []
    original = generation.generate_video

    def counting(pipeline, prompt, *arguments, **named):
        calls.append(prompt.id)
        return original(pipeline, prompt, *arguments, **named)

    monkeypatch.setattr(generation, "generate_video", counting)
    record = evaluate(request_of(ids=found.ids), found.out, CPU)
    assert calls == [FAILING]
    assert not any(item["failed"] for item in record["items"])
    assert evaluate(request_of(ids=found.ids), found.out, CPU)["summary"] == record["summary"]
    assert calls == [FAILING]


def test_metrics_can_be_taken_again_without_generating(found, request_of, monkeypatch):
    monkeypatch.setattr(generation, "load_in_mode", lambda *_: pytest.fail("a model was loaded"))
    complete = [item for item in found.ids if item != FAILING]
    before = evaluate(request_of(ids=complete), found.out, CPU)
    (found.out / "metrics.jsonl").unlink()
    assert evaluate(request_of(ids=complete), found.out, CPU)["items"] == before["items"]


def test_other_settings_do_not_mix_with_an_existing_evaluation(found, request_of):
    with pytest.raises(OutputError, match="differs in settings num_steps"):
        evaluate(Request(**{**vars(request_of(ids=found.ids)), "settings": SETTINGS}), found.out, CPU)


def test_another_memory_mode_does_not_mix_with_an_existing_evaluation(found, request_of):
    assert found.record["settings"]["memory"] == "resident"
    with pytest.raises(OutputError, match="differs in memory:"):
        evaluate(request_of(ids=found.ids, memory="lean"), found.out, CPU)


def test_a_model_that_makes_no_video_at_all_is_an_error(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "generate_video", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match=r"16-bit made no video.*ZeroDivisionError"):
        evaluate(request_of(limit=1), tmp_path / "out", CPU)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["items"][0]["failed"]


def test_maps_that_cannot_be_made_stop_nothing_and_are_made_by_the_next_run(request_of, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(generation, "layer_maps", lambda *_: 1 / 0)
        record = evaluate(request_of(limit=1), tmp_path / "out", CPU)
    assert record["models"][1]["maps"] is None and record["items"][0]["metrics"]["rtn"]
    monkeypatch.setattr(generation, "generate_video", lambda *_, **__: pytest.fail("a video was generated again"))
    assert evaluate(request_of(limit=1), tmp_path / "out", CPU)["models"][1]["maps"]


def test_a_gpu_that_stops_working_fails_no_item(request_of, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(generation, "generate_video", broken)
    with pytest.raises(DeviceError, match=r"the GPU stopped working \(RuntimeError: CUDA error"):
        evaluate(request_of(limit=1), tmp_path / "out", CPU)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_a_copy_of_the_model_that_differs_is_refused_where_it_is(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "outline", lambda source: "another")
    with pytest.raises(ModelError, match="differs from the one on the machine"):
        evaluate(request_of(limit=1), tmp_path / "out", CPU)


def test_a_model_that_was_calibrated_on_an_item_is_refused_before_any_work(rounded, tmp_path, monkeypatch):
    from tempoquant.evaluate import evaluation

    item = Item("x", "a prompt", Image.new("RGB", (8, 8)), "hash")
    monkeypatch.setattr(
        evaluation, "calibration_prompts_of",
        lambda folder: [{"id": "y", "prompt": "a prompt", "image_sha256": "hash"}] if folder == rounded.folder else [],
    )  # fmt: skip
    request = Request(Model("16-bit", SOURCE), [Model("rtn", rounded)], BenchmarkSet("mine", (item,)), STEPS)
    with pytest.raises(CalibrationError, match="calibrated on"):
        evaluate(request, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
    record = evaluate(Request(**{**vars(request), "overlap": Overlap.ALLOW}), tmp_path / "out", CPU)
    assert record["benchmark"]["overlap"] == ["x"]
    assert any("--allow-overlap" in note for note in record["notes"])


def test_a_flow_shift_left_open_is_refused(benchmark):
    import dataclasses

    with pytest.raises(SettingsError, match="--flow-shift"):
        Request(Model("16-bit", SOURCE), [], benchmark, dataclasses.replace(STEPS, flow_shift=None))


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_different(benchmark, seeds):
    with pytest.raises(SettingsError, match="seeds"):
        Request(Model("16-bit", SOURCE), [], benchmark, STEPS, seeds)
