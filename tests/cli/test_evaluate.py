"""`evaluate`, with a made-up evaluation in place of models."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from tempoquant.engines import Local
from tempoquant.evaluate import evaluation as module
from tempoquant.evaluate.benchmark_sets import Overlap
from tempoquant.evaluate.vbench.dimensions import DEFAULT
from tests.cli.typed import assert_refused, run, split

MODEL = {
    "bits_per_weight": 4.25, "memory": {"peak_rss_gib": None, "peak_gpu_gib": {"denoising": 2.0, "decoding": 3.5}},
    "costs": {"seconds_per_step": {"median": 0.5, "low": 0.4, "high": 0.75, "n": 24},
              "seconds_per_step_ratio": {"median": 1.5, "low": None, "high": None, "n": 2}},
}  # fmt: skip
ROW = {"label": "model", "metric": "psnr_db", "words": "30.10 dB (29 to 31, n = 24)", "mean": 30.1}
RECORD = {
    "benchmark": {"name": "tiny", "num_items": 24, "excluded_overlap": ["x"],
                  "skipped": [{"id": "bad_1", "why": "it has no prompt."}]},
    "settings": {"seeds": [0, 1], "memory": "swap"},
    "models": [{**MODEL, "label": "16-bit"}, {**MODEL, "label": "model"}],
    "items": [{"failed": {"model": "out of memory"}}, {"failed": {}}],
    "summary": [ROW, {**ROW, "metric": "sqnr_db low_noise bin 0"}],
    "pairs": [{"metric": "psnr_db", "words": "b is above a"}],
    "notes": ["VMAF is not meaningful here."],
}  # fmt: skip


@pytest.fixture
def requests(monkeypatch):
    """Record the calls of evaluation.evaluate."""
    calls = []

    def fake(request, output, engine, progress):
        calls.append((request, output, engine))
        return RECORD

    monkeypatch.setattr(module, "evaluate", fake)
    return calls


def test_everything_a_person_should_know_is_shown(requests, pipeline, tmp_path):
    shown = " ".join(run("evaluate", "tiny", pipeline, "--benchmark", "tiny", "-o", tmp_path / "out").stdout.split())
    for words in ("30.10 dB (29 to 31, n = 24)", "b is above a", "VMAF is not meaningful here.", "SQNR of the latent",
                  "1 entries skipped, such as bad_1: it has no prompt.", "1 items left out",
                  "1 videos failed, such as one of model: out of memory", "24 items × 2 seeds",
                  "in memory mode swap", "0.500 (0.400 to 0.750)", "1.50 × │", "3.50"):  # fmt: skip
        assert words in shown


def test_json_is_one_object(requests, pipeline, tmp_path):
    result = run("evaluate", "tiny", pipeline, "--benchmark", "tiny", "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["summary"][0]["mean"] == 30.1


def test_flags_reach_the_request(requests, pipeline, tmp_path):
    flags = "--benchmark tiny --limit 3 --seeds 4,5 --ids a,b --exclude-overlap --steps 7 --frames 9 --device cpu"
    sizes = "--size 32x48 --guidance-scale 2 --flow-shift 3"
    result = run("evaluate", "tiny", pipeline, *split(flags), *split(sizes), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    [(request, output, engine)] = requests
    assert (output, engine) == (tmp_path / "out", Local(("cpu",)))
    assert (request.seeds, request.ids, request.limit) == ((4, 5), ["a", "b"], 3)
    assert request.overlap is Overlap.EXCLUDE
    settings = request.settings
    assert (settings.height, settings.width, settings.num_steps, settings.num_frames) == (32, 48, 7, 9)
    assert (settings.guidance_scale, settings.flow_shift) == (2.0, 3.0)


@pytest.mark.parametrize(("flags", "mode"), [([], "resident"), (["--memory", "lean"], "lean")])
def test_the_memory_mode_reaches_the_request(requests, pipeline, tmp_path, flags, mode):
    run("evaluate", "tiny", pipeline, "--benchmark", "tiny", "-o", tmp_path / "out", *flags)
    assert requests[0][0].memory == mode


def test_the_models_own_settings_hold_with_its_flow_shift_made_explicit(requests, pipeline, tmp_path):
    run("evaluate", "tiny", pipeline, "--benchmark", "tiny", "-o", tmp_path / "out")
    request = requests[0][0]
    assert request.settings.flow_shift is not None
    assert (request.reference.label, len(request.benchmark.items), request.overlap) == ("16-bit", 24, Overlap.REFUSE)


def test_labels_are_folder_names_that_stay_apart(requests, pipeline, tmp_path):
    for place in ("a/ours", "b/ours", "my model"):
        shutil.copytree(pipeline, tmp_path / place)
    folders = [tmp_path / "a/ours", tmp_path / "b/ours", tmp_path / "my model"]
    run("evaluate", "tiny", *folders, "--benchmark", "tiny", "--activation-bits", "8@0-500", "-o", tmp_path / "out")
    models = requests[0][0].models
    assert [model.label for model in models] == ["a-ours-a8@0-500", "b-ours-a8@0-500", "my-model-a8@0-500"]
    assert {model.activation_bits for model in models} == {"8@0-500"}


def test_a_speed_makes_rows_of_its_own_beside_w4a4(requests, pipeline, tmp_path):
    flags = "--benchmark tiny --device cpu --speed fast --speed fastest --cache taylorseer"
    result = run("evaluate", "tiny", pipeline, *split(flags), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    models = requests[0][0].models
    assert [model.label for model in models] == ["model", "model-fast", "model-fastest"]
    assert models[0].speed is None
    assert [model.speed.cache.name for model in models[1:]] == ["taylorseer"] * 2
    assert pickle.loads(pickle.dumps(models[1])).speed == models[1].speed


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--benchmark tiny --device cpu --speed fast", 1, "MagCache needs magnitude ratios"),
        ("--benchmark tiny --device cpu --cache firstblock", 2, "need --speed"),
        ("--benchmark opens2v", 1, "give its folder with --root"),
        ("--benchmark nothing.jsonl", 1, "there is no prompt file or folder"),
        ("--benchmark tiny --seeds 1,x", 2, "is not whole numbers"),
        ("--benchmark tiny --exclude-overlap --allow-overlap", 2, "contradict each other"),
        ("--benchmark tiny --seeds 1,1", 1, "different whole numbers"),
    ],
)
def test_bad_input_is_refused_before_any_work(requests, pipeline, tmp_path, flags, code, words):
    assert_refused(run("evaluate", "tiny", pipeline, *split(flags), "-o", tmp_path / "out"), code, words)
    assert requests == []


def test_the_same_folder_twice_is_refused(requests, pipeline, tmp_path):
    result = run("evaluate", "tiny", pipeline, pipeline, "--benchmark", "tiny", "-o", tmp_path / "out")
    assert_refused(result, 1, "would both be called")


def test_vbench_reaches_the_request_and_its_flags_go_together(requests, pipeline, tmp_path):
    arguments = ["evaluate", "tiny", pipeline, "--benchmark", "tiny", "-o", tmp_path / "out"]
    run(*arguments)
    run(*arguments, "--vbench-python", "venv/bin/python")
    wanted = "--vbench-dimensions dynamic_degree,i2v_subject --vbench-cache weights"
    run(*arguments, "--vbench-python", "venv/bin/python", *split(wanted))
    without, default, chosen = (request.vbench for request, _, _ in requests)
    assert without is None
    assert (default.python, default.dimensions) == (Path("venv/bin/python"), DEFAULT)
    assert (list(chosen.dimensions), chosen.cache) == (["dynamic_degree", "i2v_subject"], Path("weights"))


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--vbench-dimensions dynamic_degree", 2, "need --vbench-python"),
        ("--vbench-python p --vbench-dimensions camera_motion", 1, "cannot be scored here"),
    ],
)
def test_vbench_flags_that_make_no_sense_are_refused(requests, pipeline, tmp_path, flags, code, words):
    arguments = ["evaluate", "tiny", pipeline, "--benchmark", "tiny", "-o", tmp_path / "out"]
    assert_refused(run(*arguments, *split(flags)), code, words)


def test_vbenchs_numbers_failures_and_trap_are_shown(requests, pipeline, tmp_path, monkeypatch):
    row = {"label": "model", "metric": "vbench_raw_mean", "words": "0.6123, 0.0100 below the reference"}
    failed = [
        {"dimension": "dynamic_degree", "why": "OSError: unreadable"},
        {"dimension": "i2v_subject", "label": "model", "id": "cup", "seed": 3, "why": "ValueError: no frame"},
    ]
    monkeypatch.setitem(RECORD, "vbench", {"version": "0.1.5", "summary": [row], "failed": failed})
    shown = " ".join(run("evaluate", "tiny", pipeline, "--benchmark", "tiny", "-o", tmp_path / "out").stdout.split())
    for words in ("VBench 0.1.5", "VBench, raw mean", "0.6123, 0.0100 below", "score collapsed videos high",
                  "dynamic_degree failed (all that was left): OSError: unreadable",
                  "i2v_subject failed (model, cup, seed 3): ValueError: no frame"):  # fmt: skip
        assert words in shown
