"""VBench inside a whole evaluation: checked before the first video, scored after the last, null
where nobody asked.
"""

import json

import pytest

from tempoquant.engines import Local
from tempoquant.errors import EvaluationError
from tempoquant.evaluate.benchmark_sets.bundled import load_bundled
from tempoquant.evaluate.evaluation import evaluate
from tempoquant.evaluate.plan import Model
from tempoquant.evaluate.request import Request
from tempoquant.evaluate.vbench.settings import VBenchSettings
from tests.evaluate import fake_vbench
from tests.recorded import SETTINGS, SOURCE

CPU = Local(("cpu",))


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return fake_vbench.make_environment(tmp_path_factory.mktemp("environment") / "venv")


def request(vbench):
    """Request the bundled model beside itself."""
    models = [Model("again", SOURCE)]
    return Request(Model("16-bit", SOURCE), models, load_bundled(2), SETTINGS.replace(num_steps=2), vbench=vbench)


def test_what_vbench_lacks_stops_everything_before_the_first_video(python, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    settings = VBenchSettings(python, ("subject_consistency", "temporal_flickering"), tmp_path / "cache")
    with pytest.raises(EvaluationError, match=r"nothing was generated:\n.*dino_vitbase16_pretrain\.pth is not there"):
        evaluate(request(settings), tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_scores_are_in_the_record_and_null_without_the_flag(python, tmp_path):
    settings = VBenchSettings(python, ("temporal_flickering",), tmp_path / "cache")
    record = evaluate(request(settings), tmp_path / "out", CPU)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == json.loads(json.dumps(record))
    assert record["schema"] == 1 and record["vbench"]["failed"] == []
    # The bundled model beside itself: the same files.
    sizes = [(tmp_path / "out" / item["videos"]["16-bit"]).stat().st_size / 1000 for item in record["items"]]
    assert record["vbench"]["models"]["again"]["raw_mean"] == pytest.approx(sum(sizes) / 2)
    assert record["vbench"]["models"]["again"]["relative_drop"] == 0
    assert evaluate(request(None), tmp_path / "out", CPU)["vbench"] is None
    again = evaluate(request(settings), tmp_path / "out", CPU)
    assert again["vbench"] == record["vbench"]


def test_a_vbench_that_scores_nothing_fails_the_run_and_leaves_the_other_measures(python, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache" / "torch"))
    fake_vbench.make_weights(tmp_path / "cache")
    (tmp_path / "cache" / "unreadable").touch()
    settings = VBenchSettings(python, ("imaging_quality",), tmp_path / "cache")
    with pytest.raises(EvaluationError, match="scored no video; of imaging_quality it said: OSError: the weights"):
        evaluate(request(settings), tmp_path / "out", CPU)
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert kept["vbench"] is None and kept["summary"]
