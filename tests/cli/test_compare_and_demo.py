"""`compare` and `demo`, with made-up numbers in place of models."""

import json
import shutil

import numpy as np
import pytest

from tempoquant import quantizing
from tempoquant.errors import ModelError
from tempoquant.evaluate import compare as module
from tempoquant.evaluate import evaluation
from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.files import write_lossless
from tempoquant.evaluate.results import Comparison, ModelResult, NoisePredictionError, Summary, VideoResult
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tempoquant.report import build
from tests.cli.typed import assert_refused, run, split
from tests.recorded import SOURCE


def comparison(models: dict[str, SourceModel]) -> Comparison:
    def result(label, folder="reference", **video):
        errors = [
            NoisePredictionError("high_noise", index, (900.0, 999.0), Summary.of([20.0, 21.0]), 8)
            for index in ((None, 0, 1) if video else ())
        ]
        return ModelResult(
            label, str(folder), 4.38, 2**20, tuple(errors), (VideoResult("p0", **video, motion_followed=True),)
        )

    reference = result("16-bit")
    others = tuple(result(label, source.folder, psnr_db=30.0, ssim=0.9) for label, source in models.items())
    return Comparison(reference, others, {"p0": "a red circle moves left slowly"}, 0, {"num_steps": 2})


@pytest.fixture
def compare_calls(monkeypatch):
    """Record the calls of evaluate.compare.compare, which returns made-up numbers and black
    videos.
    """
    calls = []

    def fake(reference, models, task, device, progress, prepare, memory):
        calls.append((reference, dict(models), task, device, memory))
        videos = {label: [np.zeros((3, 64, 64, 3), np.uint8)] for label in ("16-bit", *models)}
        return module.Evidence(comparison(models), videos)

    monkeypatch.setattr(module, "compare", fake)
    return calls


def test_compare_shows_a_table_and_bins(compare_calls, pipeline):
    shown = run("compare", "tiny", pipeline, "--samples", 3).stdout
    for words in ("16-bit", "4.38", "20.5 ± 0.7", "30.0", "0.900", "1 of 1", "900 … 999", "1.0 MiB"):
        assert words in shown
    assert "appearance" not in shown  # nobody measured it here
    [(_, models, task, _, _)] = compare_calls
    assert {label: source.folder for label, source in models.items()} == {"model": pipeline}
    assert (len(task.prompts), task.in_bundled_world) == (3, True)


def test_compare_generates_as_the_flags_say_and_else_as_the_model(compare_calls, pipeline):
    flags = split("--size 32x48 --frames 5 --steps 2 --guidance-scale 1 --flow-shift 3")
    for each in (flags, []):
        assert run("compare", "tiny", pipeline, "--samples", 1, *each).exit_code == 0
    asked, own = (call[2].settings for call in compare_calls)
    assert asked == SamplingSettings(32, 48, 5, 2, 1.0, 3.0, own.fps)
    assert own == default_settings(SOURCE)


def test_compare_says_when_it_falls_back_on_the_published_settings(
    compare_calls, pipeline, model, tmp_path, image, caplog
):
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": image.name, "prompt": "a cat"}))
    arguments = ["compare", model, pipeline, "--samples", 1, "--samples-from", tmp_path / "p.jsonl"]
    assert run(*arguments, "--frames", 5).exit_code == 0
    [line] = caplog.messages
    assert (
        "model has no sampling.json, so height 480, width 832, num_steps 40, guidance_scale 3.5, flow_shift 5 are"
        in line
    )
    run(*arguments, *split("--size 32x32 --frames 5 --steps 2 --guidance-scale 1 --flow-shift 3"))
    assert len(caplog.messages) == 1  # nothing was left to fall back on
    (model / "sampling.json").write_text('{"height": 32}')
    run(*arguments)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("flags", "mode"), [([], "resident"), (["--memory", "swap"], "swap")])
def test_compare_passes_the_memory_mode_on(compare_calls, pipeline, flags, mode):
    run("compare", "tiny", pipeline, "--samples", 1, *flags)
    assert compare_calls[0][-1] == mode


def test_compare_prints_one_json_object(compare_calls, pipeline):
    record = json.loads(run("compare", "tiny", pipeline, "--json", "--samples", 1).stdout)
    assert record["models"][0]["noise_prediction"][0]["sqnr_db"]["num_values"] == 2
    assert record["reference"]["label"] == "16-bit"


def test_prompts_of_ones_own_are_of_no_bundled_world(compare_calls, pipeline, model, tmp_path, image):
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": image.name, "prompt": "a cat"}))
    result = run("compare", model, pipeline, "--samples", 1, "--samples-from", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.output
    assert compare_calls[0][2].in_bundled_world is False


@pytest.mark.parametrize(
    ("reference", "flags", "words"),
    [
        ("tiny", ["--samples-from", "missing.jsonl"], "there is no prompt file or folder"),
        ("nowhere/at/all", [], "has no built-in prompts"),
        ("nowhere/at/all", ["--samples-from", "p.jsonl", "--samples", "1"], "there is no model folder"),
        ("tiny", ["--samples-from", "p.jsonl", "--samples", "2"], "holds 1 prompts, 2 are wanted"),
    ],
)
def test_compare_refuses_bad_input(compare_calls, pipeline, tmp_path, image, monkeypatch, reference, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": image.name, "prompt": "a cat"}))
    assert_refused(run("compare", reference, pipeline, *flags), 1, words)
    assert compare_calls == []


@pytest.fixture
def quantize_calls(quantize_calls, monkeypatch, pipeline):
    """Record the calls as everywhere, but leave a quantized pipeline behind."""
    fake = quantizing.quantize

    def writing(model, output, recipe, **arguments):
        shutil.copytree(pipeline, output, dirs_exist_ok=True)
        return fake(model, output, recipe, **arguments)

    monkeypatch.setattr(quantizing, "quantize", writing)
    return quantize_calls


@pytest.fixture
def evaluate_calls(monkeypatch):
    """Record the calls of evaluation.evaluate, which leaves black clips, made-up numbers and no
    real page.
    """
    calls = []

    def fake(request, output, device, progress):
        calls.append((request, output, device))
        labels = [model.label for model in request.sides]
        for label in labels:
            place = EvaluationFolder(output).place("lossless", Take(label, "a", 0))
            place.parent.mkdir(parents=True)
            write_lossless(place, np.zeros((3, 64, 64, 3), np.uint8), 8)
        metrics = {label: {"motion_followed": True, "psnr_db": 30.0} for label in labels}
        item = {"id": "a", "seed": 0, "prompt": "a red circle", "metrics": metrics, "failed": {}}
        items = [item, {**item, "id": "b", "failed": {"rtn": "it fell over"}}]
        memory = {"peak_rss_gib": 1.0, "peak_gpu_gib": None}
        costs = {"seconds_per_step": {"median": 0.1, "low": None, "high": None, "n": 2}, "seconds_per_step_ratio": None}
        models = [{"label": label, "bits_per_weight": 4.38, "memory": memory, "costs": costs} for label in labels]
        return {
            "reference": "16-bit", "models": models, "items": items, "notes": [],
            "settings": {"fps": 8, "seeds": [0], "memory": "resident"},
            "benchmark": {"name": "tiny", "num_items": 2, "skipped": [], "excluded_overlap": []}, "summary": [],
            "pairs": [],
        }  # fmt: skip

    monkeypatch.setattr(evaluation, "evaluate", fake)
    monkeypatch.setattr(build, "build_report", lambda folders, output, progress: output.write_text(str(folders)))
    return calls


def test_demo_leaves_everything_where_it_says(quantize_calls, evaluate_calls, tmp_path):
    result = run("demo", "-o", tmp_path / "demo", "--model", "tiny")
    assert result.exit_code == 0, result.output
    for name in ("report.html", "side_by_side.mp4", "contact_sheet.png", "results.json"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
        assert name in result.stdout
    assert [(call[1].name, call[2].name) for call in quantize_calls] == [("rtn", "rtn"), ("tiny", "tiny")]
    record = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [model["label"] for model in record["evaluation"]["models"]] == ["16-bit", "rtn", "tiny"]
    [(request, output, _)] = evaluate_calls
    assert output == tmp_path / "demo" / "evaluation" and str(output) in (tmp_path / "demo" / "report.html").read_text()
    assert (request.limit, len(request.benchmark.items), request.settings.flow_shift) == (6, 6, 5.0)


def test_demo_prints_the_json_that_it_stores(quantize_calls, evaluate_calls, tmp_path):
    result = run("demo", "-o", tmp_path, "--model", "tiny", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "results.json").read_text())


def test_a_second_demo_says_what_it_reused(quantize_calls, evaluate_calls, tmp_path):
    for name in ("rtn", "tiny"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    assert "already quantized, reused" in run("demo", "-o", tmp_path, "--model", "tiny").stdout
    assert len(quantize_calls) == 2  # which checks that they are of the same run


def test_demo_anew_evaluates_anew(quantize_calls, evaluate_calls, tmp_path):
    for flags in ([], ["--overwrite"]):
        assert run("demo", "-o", tmp_path, "--model", "tiny", *flags).exit_code == 0
    assert len(evaluate_calls) == 2  # the second would find the first one's files in its way


def test_demo_with_the_baseline_as_recipe_compares_one_model(quantize_calls, evaluate_calls, tmp_path):
    record = json.loads(run("demo", "-o", tmp_path, "--model", "tiny", "--recipe", "rtn", "--json").stdout)
    assert [model["label"] for model in record["evaluation"]["models"]] == ["16-bit", "rtn"]


def test_demo_tells_recipes_of_one_name_apart(quantize_calls, evaluate_calls, tmp_path):
    (tmp_path / "mine.toml").write_text('name = "rtn"\nformat = "int4"\n')
    result = run("demo", "-o", tmp_path / "demo", "--model", "tiny", "--recipe", tmp_path / "mine.toml")
    assert_refused(result, 1, "give it another name")
    assert quantize_calls == []


@pytest.mark.parametrize("flags", [["--recipe", "nonsense"], ["--model", "nonsense"]])
def test_demo_with_a_bad_flag_leaves_no_folder(quantize_calls, evaluate_calls, tmp_path, flags):
    result = run("demo", "-o", tmp_path / "demo", *flags)
    assert_refused(result, 1, "'nonsense'" if "--recipe" in flags else "nonsense has no built-in prompts")
    assert not (tmp_path / "demo").exists()


def test_demo_on_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "demo").write_text("")
    assert_refused(run("demo", "-o", tmp_path / "demo"), 1, "File exists")


def test_a_model_that_fails_leaves_no_pictures(quantize_calls, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ModelError("paper: high_noise at timestep 950 holds NaN.")

    monkeypatch.setattr(evaluation, "evaluate", broken)
    assert_refused(run("demo", "-o", tmp_path, "--model", "tiny"), 1, "holds NaN")
    assert {each.name for each in tmp_path.iterdir()} == {"rtn", "tiny"}
