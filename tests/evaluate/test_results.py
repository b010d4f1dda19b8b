import json
import math
from pathlib import Path

import pytest

from tempoquant.errors import ModelError
from tempoquant.evaluate.results import Comparison, ModelResult, NoisePredictionError, Summary, VideoResult
from tempoquant.plain_values import plain, to_json


def result(label: str, **video: object) -> ModelResult:
    return ModelResult(
        label, f"/models/{label}", 4.25, 1000, (), (VideoResult("p0", **video), VideoResult("p1", **video))
    )


def test_a_summary_is_that_of_the_textbook():
    summary = Summary.of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert summary.mean == 5.0
    assert summary.standard_deviation == pytest.approx(math.sqrt(32 / 7))
    assert summary.standard_error == pytest.approx(math.sqrt(32 / 7 / 8))
    assert summary.num_values == 8


def test_one_value_has_no_spread():
    assert Summary.of([3.0]) == Summary(3.0, None, None, 1)
    assert Summary.of([3.0]).text() == "3.0"


def test_an_infinite_value_makes_the_mean_infinite_and_the_spread_absent():
    assert Summary.of([math.inf, 20.0]) == Summary(math.inf, None, None, 2)
    assert Summary.of([math.inf, math.inf]).text() == "identical"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, -math.inf]])
def test_what_has_no_mean_is_an_error(values):
    with pytest.raises(ModelError):
        Summary.of(values)


def test_json_is_strict_and_infinities_are_texts():
    text = to_json({"a": math.inf, "b": [-math.inf], "c": Summary.of([math.inf])})
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"a": "inf", "b": ["-inf"], "c": {"mean": "inf", "num_values": 1}}
    assert float(record["a"]) == math.inf


def test_json_of_values_keeps_names_and_drops_what_was_not_measured():
    error = NoisePredictionError("low_noise", None, (10.0, 800.0), Summary.of([20.0, 22.0]), 8)
    record = plain(error)
    assert record["denoiser"] == "low_noise"
    assert "bin_index" not in record
    assert plain(Path("a") / "b") == str(Path("a") / "b")


def test_what_nobody_measured_is_absent_and_not_zero():
    record = result("reference", motion_followed=True).to_dict()
    assert not {"psnr_db", "ssim", "appearance_kept"} & set(record)
    assert record["motion_followed"]["mean"] == 1.0
    assert record["videos"][0] == {"prompt_id": "p0", "motion_followed": True}


def test_a_share_counts_false_as_measured():
    assert result("rtn", motion_followed=False).motion_followed == Summary.of([0.0, 0.0])


def test_a_comparison_becomes_json():
    comparison = Comparison(
        result("16-bit"), (result("rtn", psnr_db=math.inf, ssim=1.0),), {"p0": "a", "p1": "b"}, 3, {"num_steps": 4}
    )
    record = json.loads(to_json(comparison.to_dict()))
    assert record["models"][0]["psnr_db"]["mean"] == "inf"
    assert record["seed"] == 3
    assert list(record["prompts"]) == ["p0", "p1"]
