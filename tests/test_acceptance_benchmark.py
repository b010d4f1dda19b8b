"""The acceptance run's commands and table; each command has tests of its own."""

import pytest

from benchmarks import acceptance
from benchmarks.acceptance import LABELS, cell, commands, parse, rows_of
from tempoquant.recipe import Recipe

ROW = {"label": "ours", "metric": "psnr_db", "mean": 30.04, "difference": None, "low": 29.0, "high": 31.0, "n": 24}


def flag(command, name):
    return command[command.index(name) + 1] if name in command else None


def test_the_three_recipes_get_one_format_and_one_rank(tmp_path):
    quantize = commands(tmp_path, parse(["--rank", "3", "--format", "mxfp4"]))[:3]
    assert [flag(command, "--recipe") for command in quantize] == ["rtn", "paper", "default"]
    assert {flag(command, "--format") for command in quantize} == {"mxfp4"}
    assert Recipe.load("rtn").rank == 0  # so it has no branch to give a rank
    assert [flag(command, "--rank") for command in quantize] == [None, "3", "3"]


def test_each_command_takes_what_the_one_before_wrote(tmp_path):
    *quantize, evaluate, report = commands(tmp_path, parse(["--seeds", "0,1", "--limit", "2"]))
    written = [flag(command, "-o") for command in quantize]
    assert written == [str(tmp_path / label) for label in LABELS] == evaluate[2:5]
    assert flag(evaluate, "-o") == report[1]
    assert (flag(evaluate, "--seeds"), flag(evaluate, "--limit")) == ("0,1", "2")
    assert evaluate[1] == quantize[0][1] == "tiny-outliers"


def test_a_command_that_fails_ends_the_chain():
    with pytest.raises(SystemExit, match="2"):
        acceptance.run(["no-such-command"])


def test_a_command_takes_processor_time():
    taken = acceptance.run(["--help"])
    assert taken["command"] == "tempoquant --help"
    assert taken["processor_s"] > 0


def test_rows_hold_what_the_evaluation_found():
    document = {
        "models": [{"label": "16-bit", "bits_per_weight": 16.0}, {"label": "ours", "bits_per_weight": 4.9}],
        "summary": [ROW, {**ROW, "metric": "sqnr_db low_noise bin 0"}],
    }
    kept = {key: ROW[key] for key in ("mean", "difference", "low", "high", "n")}
    assert rows_of(document) == [
        {"label": "16-bit", "bits_per_weight": 16.0}, {"label": "ours", "bits_per_weight": 4.9, "psnr_db": kept},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "changes", "words"),
    [
        ("psnr_db", {}, "30.0 (29.0 … 31.0)"),
        ("motion_followed", {"mean": 0.92, "difference": -0.04, "low": -0.11, "high": 0.02}, "92 (Δ −11 … 2)"),
        ("ssim", {"mean": 0.9, "low": None, "high": None, "n": 2}, "0.900 (n = 2: no interval)"),
    ],
)
def test_a_cell_says_what_its_interval_is_of(metric, changes, words):
    assert cell(metric, {**ROW, **changes}) == words
    assert cell(metric, None) == "–"
