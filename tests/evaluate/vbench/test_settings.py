"""The checks before anything is generated, and scores from another environment, with a made-up
VBench.
"""

import json
from types import SimpleNamespace

import pytest

from tempoquant.errors import EvaluationError, SettingsError
from tempoquant.evaluate.evaluation_folder import Take
from tempoquant.evaluate.vbench.dimensions import DEFAULT, DIMENSIONS
from tempoquant.evaluate.vbench.scores import LOG, score_missing
from tempoquant.evaluate.vbench.settings import VBenchSettings, check_vbench, runner_environment, sha256
from tempoquant.progress import SILENT
from tests.evaluate import fake_vbench
from tests.evaluate.vbench_folder import LABELS, plan_of, write_takes

ON_A_CPU = tuple(name for name in DIMENSIONS if not DIMENSIONS[name].needs_cuda)
TEXTS = {"one": "A cup.", "two": "A cat.", "three": "A sea."}


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return fake_vbench.make_environment(tmp_path_factory.mktemp("environment") / "venv")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a cache with every file that VBench needs."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache" / "torch"))
    fake_vbench.make_weights(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def score(python, cache, tmp_path):
    """Score items with these prompts, in one folder; return scores, failures and the folder."""

    def scored(texts, dimensions):
        plan = plan_of(texts)
        folder = found.folder or write_takes(tmp_path / "out", list(texts))
        found.folder = folder
        vbench = check_vbench(VBenchSettings(python, dimensions, cache), "cpu")
        return (*score_missing(folder, plan, LABELS, vbench, SILENT), folder)

    found = SimpleNamespace(folder=None)
    return scored


def loaded(cache):
    file = cache / fake_vbench.LOADED
    return file.read_text().splitlines() if file.is_file() else []


def test_unknown_and_repeated_dimensions_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="'camera_motion' cannot be scored here"):
        VBenchSettings(tmp_path, ("camera_motion",))
    for dimensions in ((), ("dynamic_degree", "dynamic_degree")):
        with pytest.raises(SettingsError, match="one or more different"):
            VBenchSettings(tmp_path, dimensions)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (None, "is no interpreter"),
        ("echo hello", "does not run as Python"),
        ("echo no such thing >&2; exit 3", r"does not run as Python \(no such thing\)"),
    ],
)
def test_what_is_no_interpreter_is_said_to_be_none(tmp_path, program, words):
    python = tmp_path / "python"
    if program is not None:
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
    with pytest.raises(EvaluationError, match=words) as error:
        check_vbench(VBenchSettings(python, ("temporal_flickering",)), "cpu")
    assert "make vbench-env" in str(error.value)


def test_an_environment_without_vbench_is_refused_with_the_reason(tmp_path):
    python = fake_vbench.make_environment(tmp_path / "venv")
    for file in tmp_path.glob("venv/lib/python*/site-packages/vbench/__init__.py"):
        file.write_text("import decord_that_nobody_has")
    with pytest.raises(EvaluationError, match=r"cannot import VBench .*decord_that_nobody_has"):
        check_vbench(VBenchSettings(python, ("temporal_flickering",)), "cpu")


def test_every_missing_file_is_named_once_with_its_source_and_the_dimensions_that_want_it(python, cache):
    gone = [DIMENSIONS["subject_consistency"].weights[2].place(cache), cache / "clip_model" / "ViT-L-14.pt"]
    for file in gone:
        file.unlink()
    with pytest.raises(EvaluationError) as error:
        check_vbench(VBenchSettings(python, ON_A_CPU, cache), "cpu")
    lines = str(error.value).splitlines()
    assert "nothing was generated" in lines[0] and len(lines) == 3
    assert [str(file) in line for file, line in zip(gone, lines[1:], strict=True)] == [True, True]
    assert "for subject_consistency, i2v_subject: it comes from https://dl.fbaipublicfiles.com/" in lines[1]
    assert loaded(cache) == []


def test_code_that_cannot_be_imported_and_a_missing_gpu_are_in_the_same_error(tmp_path, cache):
    python = fake_vbench.make_environment(tmp_path / "venv", without="i2v_background")
    with pytest.raises(EvaluationError) as error:
        check_vbench(VBenchSettings(python, DEFAULT, cache), "cuda")
    assert "i2v_background cannot be imported there (ModuleNotFoundError: No module named 'dreamsim')" in str(
        error.value
    )
    assert "i2v_background needs a GPU and there is none" in str(error.value)


def test_vbench_sees_the_gpu_that_generates_and_no_other(tmp_path, monkeypatch):
    def seen(device):
        return runner_environment(VBenchSettings(tmp_path), device).get("CUDA_VISIBLE_DEVICES")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (seen("cpu"), seen("cuda"), seen("cuda:1")) == (None, None, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert (seen("cuda"), seen("cuda:1"), seen("cuda:0,cuda:1")) == ("4,6", "6", "4")


def test_every_dimension_loads_once_and_scores_every_video_with_its_prompt_and_picture(score, cache):
    scores, failures, _ = score(TEXTS, ON_A_CPU)
    assert failures == []
    wanted = {Take(label, id, 0): 0.1 * (place + 1) - (0.02 if label == "rtn" else 0)
              for label in LABELS for place, id in enumerate(TEXTS)}  # fmt: skip
    for dimension in ON_A_CPU:
        assert scores[dimension] == pytest.approx(wanted), dimension
    # aesthetic quality and overall consistency have two things to load, temporal flickering has
    # none.
    assert len(loaded(cache)) == len(ON_A_CPU) + 2 - 1


def test_what_is_scored_is_not_scored_again_and_other_weights_and_videos_are(score, cache):
    dimensions = ("imaging_quality", "dynamic_degree")
    _, _, folder = score(TEXTS, dimensions)
    num_lines = len(folder.scored())
    score(TEXTS, dimensions)
    assert len(folder.scored()) == num_lines == 12 and len(loaded(cache)) == 2
    (cache / "raft_model" / "models" / "raft-things.pth").write_text("other weights")
    score(TEXTS, dimensions)
    assert len(folder.scored()) == num_lines + 6
    folder.place("videos", Take("rtn", "two", 0)).write_bytes(bytes(500))
    scores, _, _ = score(TEXTS, dimensions)
    assert len(folder.scored()) == num_lines + 6 + 2
    assert {scores[dimension][Take("rtn", "two", 0)] for dimension in dimensions} == {0.5}


def test_a_video_that_fails_says_why_and_the_others_go_on(score):
    texts = {"one": fake_vbench.FAILS, "two": "A cat.", "three": fake_vbench.NO_NUMBER}
    scores, failures, _ = score(texts, ("aesthetic_quality",))
    assert {take.id for take in scores["aesthetic_quality"]} == {"two"}
    assert {(failure.take.id, failure.why) for failure in failures} == {
        ("one", "ValueError: a frame is missing"),
        ("three", "ValueError: VBench's score is nan"),
    }


def test_weights_that_cannot_be_read_stop_their_dimension_alone_and_are_tried_once(score, cache):
    (cache / "unreadable").touch()
    scores, failures, _ = score(TEXTS, ("motion_smoothness", "temporal_flickering"))
    assert [(failure.dimension, failure.take, failure.why) for failure in failures] == [
        ("motion_smoothness", None, "OSError: the weights are unreadable")
    ]
    assert len(scores["temporal_flickering"]) == 6 and scores["motion_smoothness"] == {}
    assert loaded(cache) == ["motion_smoothness"]
    (cache / "unreadable").unlink()
    scores, failures, _ = score(TEXTS, ("motion_smoothness", "temporal_flickering"))
    assert failures == [] and len(scores["motion_smoothness"]) == 6


def test_a_process_that_dies_keeps_what_it_scored_and_takes_no_other_dimension_with_it(score):
    texts = {"one": "A cup.", "two": fake_vbench.DIES, "three": "A sea."}
    scores, failures, folder = score(texts, ("imaging_quality", "dynamic_degree"))
    assert [len(scores[name]) for name in scores] == [1, 1]
    assert all(failure.take is None and "status 7" in failure.why for failure in failures) and len(failures) == 2
    assert len(folder.scored()) == 2
    assert "VBench prints what it likes" in (folder.path / LOG).read_text()


def test_a_folders_digest_tells_its_files_from_others_and_ignores_what_python_made(tmp_path):
    (tmp_path / "a").write_text("1")
    before = sha256(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("made")
    assert sha256(tmp_path) == before
    (tmp_path / "b").write_text("1")
    assert sha256(tmp_path) != before


def test_scores_are_lines_that_say_what_they_were_made_of(score):
    _, _, folder = score({"one": "A cup."}, ("temporal_flickering",))
    line = json.loads((folder.path / "vbench" / "scores.jsonl").read_text().splitlines()[0])
    assert line["video_sha256"] == sha256(folder.place("videos", Take("16-bit", "one", 0)))
    assert set(line) == {"label", "id", "seed", "dimension", "score", "video_sha256", "made_with"}
