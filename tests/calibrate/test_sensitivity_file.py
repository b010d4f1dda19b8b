"""A sensitivity file reads back exactly, and says what is wrong with a wrong one."""

import json
from pathlib import Path

import pytest

from tempoquant.calibrate.sensitivity import LayerSensitivity
from tempoquant.calibrate.sensitivity_file import Sensitivity, measured_settings
from tempoquant.errors import CalibrationError
from tempoquant.recipe import LayerRule, Recipe

OURS = Recipe.load("default")
LAYER = LayerSensitivity(0.1 + 0.2, {0: 1 / 3, 2: 1e-9})
FOUND = Sensitivity(
    {"high_noise": [{"blocks.0.q": LAYER, "blocks.0.k": LAYER}], "low_noise": []},
    {"model": "f" * 64, "recipe": measured_settings(OURS)},
)


def test_what_was_written_reads_back_exactly(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(FOUND.to_json())
    assert Sensitivity.load(file) == FOUND
    assert Sensitivity.load(file).to_json() == FOUND.to_json()


def test_it_fits_the_model_and_the_settings_that_errors_depend_on() -> None:
    rounded = OURS.replace(name="x", rank=7, gptq=False, act_order=False, num_prompts=3)
    FOUND.require_fits("f" * 64, rounded, Path("s.json"))
    with pytest.raises(CalibrationError, match=r"s.json was measured on another model"):
        FOUND.require_fits("0" * 64, OURS, Path("s.json"))
    other = OURS.replace(format="int4", layers=(LayerRule("*", rank=3),))
    with pytest.raises(CalibrationError, match="a recipe of other format and layers"):
        FOUND.require_fits("f" * 64, other, Path("s.json"))
    with pytest.raises(CalibrationError, match="a recipe of other rotation and prior_fraction"):
        FOUND.require_fits("f" * 64, OURS.replace(rotation=False, prior_fraction=0.0), Path("s.json"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("tempoquant_sensitivity",), 2),
        (("experts",), {}),
        (("experts", "high_noise", 0), {}),
        (("experts", "high_noise", 0, "blocks.0.q", "gain"), "much"),
        (("experts", "high_noise", 0, "blocks.0.q", "errors"), {"2": 1.0}),
        (("experts", "high_noise", 0, "blocks.0.q", "errors", "2"), -1.0),
        (("experts", "high_noise", 0, "blocks.0.q", "errors", "2"), float("nan")),
        (("measured",), None),
    ],
)
def test_a_file_that_is_none_is_one_sentence(place: tuple, value: object, tmp_path: Path) -> None:
    record = json.loads(FOUND.to_json())
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file = tmp_path / "s.json"
    file.write_text(json.dumps(record))
    with pytest.raises(CalibrationError, match=r"s.json is not a sensitivity file \(.*tempoquant sensitivity"):
        Sensitivity.load(file)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        Sensitivity.load(tmp_path / "s.json")
