"""`tempoquant sensitivity`, and the budget flags of `tempoquant quantize`."""

import json
from pathlib import Path

import pytest

from tempoquant import quantizing
from tempoquant.calibrate.sensitivity import LayerSensitivity
from tempoquant.calibrate.sensitivity_file import Sensitivity
from tempoquant.errors import CalibrationError
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.quantizing import Budget
from tests.cli.typed import assert_refused, run, split

LAYERS = [{f"blocks.{i}.q": LayerSensitivity(2.0, {0: 1e-2, 4: 1e-3})} for i in range(2)]
FOUND = Sensitivity(dict.fromkeys(COMPONENTS, LAYERS), {"model": "f" * 64, "recipe": {}})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Record the calls of measure_sensitivity."""
    calls: list[tuple] = []

    def fake(model, store, work, recipe, **arguments) -> Sensitivity:
        if not store.is_dir():
            raise CalibrationError(f"{store} holds no store.json.")
        calls.append((model, store, recipe, arguments["lora"], arguments["machine"].devices))
        return FOUND

    monkeypatch.setattr(quantizing, "measure_sensitivity", fake)
    return calls


def test_sensitivity_passes_everything_on_and_writes_the_file(measured, tmp_path: Path) -> None:
    flags = split("--recipe svdquant --rank 5 --device cpu")
    result = run("sensitivity", "tiny", "--store", tmp_path, "-o", tmp_path / "s.json", *flags)
    assert result.exit_code == 0
    [(model, store, recipe, loras, devices)] = measured
    assert (model, store, recipe.rank, loras, devices) == ("tiny", tmp_path, 5, {}, ("cpu",))
    assert Sensitivity.load(tmp_path / "s.json") == FOUND
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.json"]


def test_the_table_has_each_layer_alone_and_all_together_in_decibels(measured, tmp_path: Path) -> None:
    text = run("sensitivity", "tiny", "--store", tmp_path, "--rank", 5).stdout
    assert "low_noise: SQNR in dB with one layer alone rounded, rank 5" in text
    assert "30.0" in text  # 1e-3 at rank 4, the highest measured up to 5
    assert "17.0 at 0, 27.0 at 4 dB" in text  # two layers: half the power, 3 dB


def test_json_has_every_number(measured, tmp_path: Path) -> None:
    record = json.loads(run("sensitivity", "tiny", "--store", tmp_path, "--rank", 4, "--json").stdout)
    layer = record["denoisers"]["low_noise"]["layers"]["blocks.1.q"]
    assert layer == {"gain": 2.0, "errors": {"0": 1e-2, "4": 1e-3}}
    assert record["denoisers"]["low_noise"]["sqnr_db"] == pytest.approx(27.0, abs=0.02)


def test_a_missing_store_is_one_sentence(measured, tmp_path: Path) -> None:
    assert_refused(run("sensitivity", "tiny", "--store", tmp_path / "none"), 1, "holds no store.json")


def test_quantize_passes_a_budget_and_its_file_on(quantize_calls, tmp_path: Path) -> None:
    flags = split(f"--bits-per-weight 5.5 --sensitivity {tmp_path / 's.json'}")
    assert run("quantize", "tiny", "-o", tmp_path / "out", *flags).exit_code == 0
    assert run("quantize", "tiny", "-o", tmp_path / "out", "--size-gib", 20).exit_code == 0
    first, second = (arguments for *_, arguments in quantize_calls)
    assert (first["budget"], first["sensitivity"]) == (Budget(bits_per_weight=5.5), tmp_path / "s.json")
    assert second["budget"] == Budget(size_gib=20.0) and "sensitivity" not in second


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--bits-per-weight 5 --size-gib 3", 1, "give one of the two"),
        ("--bits-per-weight 17", 1, "17 bits a weight hold the model in 16 bits"),
        ("--size-gib 0", 2, "Invalid value for '--size-gib'"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(quantize_calls, tmp_path, flags: str, code: int, words: str) -> None:
    assert_refused(run("quantize", "tiny", "-o", tmp_path / "out", *split(flags)), code, words)
    assert quantize_calls == []


def test_a_dry_run_with_a_budget_says_that_sensitivity_is_measured(tmp_path: Path) -> None:
    result = run("quantize", "tiny", "--dry-run", "--json", "--rank", 2, "--bits-per-weight", 5)
    assert result.exit_code == 0, result.stderr
    assert "measure sensitivity of low_noise" in [stage["name"] for stage in json.loads(result.stdout)["stages"]]
    assert_refused(run("quantize", "tiny", "--dry-run", "--bits-per-weight", 3), 1, "is too small")
