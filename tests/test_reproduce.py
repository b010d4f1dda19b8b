"""Laws of the script that checks the published claim: what it runs, when it stops, and that it
makes no figure up.
"""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce import chain_of, main, parse
from benchmarks.reproduce_items import spread_over_categories, write_calibration
from benchmarks.reproduce_plan import PUBLISHED_MODEL
from benchmarks.reproduce_run import text_of
from benchmarks.reproduce_table import CLAIMS, IMAGING, MEMORY, VBENCH, measured_text, rows_of
from tempoquant.errors import CalibrationError
from tempoquant.evaluate.benchmark_sets import Item
from tests.opens2v_tree import CATEGORIES, USABLE, write_tree

ROOT = Path(__file__).parent.parent
OPENS2V = ("--opens2v", "tree")


def commands_of(*options: str) -> list[list[str]]:
    return chain_of(parse(options)).commands()


def only(commands: list[list[str]], name: str) -> list[str]:
    found = [command for command in commands if command[0] == name]
    assert len(found) == 1
    return found[0]


def options_of(command: list[str]) -> dict[str, str]:
    return {word: value for word, value in itertools.pairwise(command) if word.startswith("-")}


def items(sizes: dict[str, int]) -> tuple[Item, ...]:
    return tuple(Item(f"{name}_{n}", "p", Path(f"{name}_{n}.png"), "h", name) for name, size in sizes.items()
                 for n in range(1, size + 1))  # fmt: skip


OPENS2V_SIZES = {"singleobj": 30, "singlehuman": 30, "singleface": 30, "multiobject": 30, "humanobj": 15,
                 "faceobj": 15, "multiface": 15, "multihuman": 15}  # fmt: skip


def test_the_published_protocol_is_what_record_and_evaluate_are_told():
    commands = commands_of(*OPENS2V)
    for name in ("record", "evaluate"):
        told = options_of(only(commands, name))
        wanted = {
            "--size": "480x832",
            "--frames": "61",
            "--steps": "40",
            "--flow-shift": "5",
            "--guidance-scale": "3.5",
        }
        assert wanted.items() <= told.items()
    assert options_of(only(commands, "record"))["--prompts"] == "12"
    evaluate = only(commands, "evaluate")
    assert options_of(evaluate)["--seeds"] == "42" and "--exclude-overlap" in evaluate and "--limit" not in evaluate


def test_all_models_are_quantized_from_one_store_and_stand_in_one_evaluation():
    commands = commands_of(*OPENS2V, "--work", "w")
    stores = {options_of(command)["--store"] for command in commands if command[0] == "quantize"}
    assert stores == {options_of(only(commands, "record"))["-o"]} == {str(Path("w/samples"))}
    assert only(commands, "evaluate")[1:4] == [PUBLISHED_MODEL, str(Path("w/paper")), str(Path("w/ours"))]


def test_the_small_chain_differs_in_model_sizes_recipes_and_items_alone():
    published, tiny = commands_of(*OPENS2V), commands_of("--model", "tiny", *OPENS2V)

    def shape(commands: list[list[str]]) -> list[list[str]]:
        few = {"--limit", "--rank"}
        return [
            [command[0], *(word for word in command if word.startswith("-") and word not in few)]
            for command in commands
        ]

    assert shape(published) == shape(tiny)


def test_device_memory_and_vbench_reach_every_command_that_takes_them():
    commands = commands_of(
        *OPENS2V, "--device", "cuda:1", "--engine", "ray", "--address", "head:6379", "--memory", "swap",
        "--vbench-python", "p", "--vbench-cache", "c",
    )  # fmt: skip
    for command in commands:
        told = options_of(command)
        for flag, value in (("--device", "cuda:1"), ("--engine", "ray"), ("--address", "head:6379")):
            assert (told.get(flag) == value) == (command[0] in ("record", "quantize", "evaluate"))
        assert (told.get("--memory") == "swap") == (command[0] in ("record", "evaluate"))
        assert (told.get("--vbench-python"), told.get("--vbench-cache")) == (
            ("p", "c") if command[0] == "evaluate" else (None, None)
        )


def test_rounding_to_nearest_is_quantized_without_samples():
    quantize = [command for command in commands_of(*OPENS2V, "--rtn") if command[0] == "quantize"]
    assert ["--store" in command for command in quantize] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "says"),
    [((), "give its folder with --opens2v"), ((*OPENS2V, "--vbench-cache", "c"), "belongs to --vbench-python")],
)
def test_options_that_cannot_work_are_refused(options, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(options)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_twelve_of_the_benchmark_are_two_or_one_of_each_category():
    chosen = spread_over_categories(items(OPENS2V_SIZES), 12)
    counts = {name: sum(item.category == name for item in chosen) for name in OPENS2V_SIZES}
    assert len({item.id for item in chosen}) == 12
    assert counts == {name: size // 15 for name, size in OPENS2V_SIZES.items()}


def test_the_choice_does_not_depend_on_the_files_order():
    some = items(OPENS2V_SIZES)
    assert {item.id for item in spread_over_categories(some, 12)} == {
        item.id for item in spread_over_categories(tuple(reversed(some)), 12)
    }


def test_items_must_be_left_to_evaluate():
    with pytest.raises(CalibrationError, match="3 usable items are too few"):
        spread_over_categories(items({"a": 3}), 3)


def test_the_calibration_file_holds_the_items_own_ids(tmp_path: Path):
    ids = write_calibration(write_tree(tmp_path / "tree"), USABLE // 2, tmp_path / "work" / "calibration.jsonl")
    lines = [
        json.loads(line) for line in (tmp_path / "work/calibration.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["id"] for line in lines] == ids and {id.rpartition("_")[0] for id in ids} == set(CATEGORIES)
    assert all(Path(line["image"]).is_file() and line["prompt"] for line in lines)


def evaluation(**changes: Any) -> dict[str, Any]:
    def model(label: str, gib: dict[str, float] | None) -> dict[str, Any]:
        return {"label": label, "memory": {"peak_rss_gib": 1.0, "peak_gpu_gib": gib}}

    return {
        "reference": "16-bit",
        "models": [model("16-bit", {"denoising": 50.0, "decoding": 20.0}),
                   model("paper", {"denoising": 15.0, "decoding": 20.0}), model("ours", None)],
        "items": [{"videos": {"16-bit": "a", "paper": "b", "ours": "c"}}, {"videos": {"16-bit": "a", "paper": "b"}}],
        "vbench": None,
    } | changes  # fmt: skip


def row(found: dict[str, Any], claim: str, label: str = "paper") -> dict[str, Any]:
    return next(each for each in rows_of(found) if each["claim"] == claim and each["label"] == label)


def test_memory_is_compared_by_the_largest_phase_of_each_model():
    found = row(evaluation(), MEMORY)
    assert (found["change"], found["n"], found["low"]) == (pytest.approx(20 / 50 - 1), 2, None)
    assert measured_text(found) == "−60.0 % (n = 2)"


def test_what_was_not_measured_has_no_number():
    for found in (row(evaluation(), MEMORY, "ours"), row(evaluation(), VBENCH), row(evaluation(), IMAGING, "ours")):
        assert [found[key] for key in ("reference", "value", "change", "low", "high", "n")] == [None] * 6
        assert measured_text(found).startswith("not measured (no ")


SCORES = {"16-bit": {"raw": {"imaging_quality": 0.7}, "raw_mean": 0.8, "num_items": 9},
          "paper": {"raw": {"imaging_quality": 0.63}, "raw_mean": 0.792, "num_items": 9},
          "ours": {"raw": {"imaging_quality": None}, "raw_mean": None, "num_items": 0}}  # fmt: skip


@pytest.mark.parametrize("vbench", [SCORES, {"models": SCORES, "dimensions": ["imaging_quality"]}])
def test_scores_are_compared_relative_to_the_reference(vbench):
    found = evaluation(vbench=vbench)
    assert row(found, VBENCH)["change"] == pytest.approx(-0.01) and row(found, IMAGING)["change"] == pytest.approx(-0.1)
    assert measured_text(row(found, VBENCH)) == "−1.0 % (n = 9)"
    assert row(found, IMAGING, "ours")["change"] is None


def test_the_interval_of_a_paired_difference_becomes_relative_too():
    summary = [{"label": "paper", "metric": "vbench_raw_mean", "reference_mean": 0.8, "difference": -0.008,
                "low": -0.016, "high": 0.004, "n": 168}]  # fmt: skip
    found = row(evaluation(vbench={"models": SCORES, "summary": summary}), VBENCH)
    assert measured_text(found) == "−1.0 % (−2.0 to +0.5, n = 168)"


def test_every_claim_is_shown_for_every_quantized_model():
    assert [(each["label"], each["claim"]) for each in rows_of(evaluation())] == [
        (label, claim) for label in ("paper", "ours") for claim in CLAIMS
    ]


def documented(page: str, starts: str) -> list[str]:
    """Return lines of a page's indented or fenced blocks that begin with a word, continued lines
    joined.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (" ".join(shlex.split(line)) for line in text.splitlines() if line.startswith(f"    {starts}"))
    return [line.strip() for line in lines]


def test_the_page_shows_the_commands_that_the_script_prints(capsys):
    (script,) = (
        line for line in documented("reproduce.md", "python -m benchmarks.reproduce") if line.endswith("--print")
    )
    main(shlex.split(script)[3:])
    printed = [" ".join(shlex.split(line)) for line in capsys.readouterr().out.splitlines()]
    assert printed and documented("reproduce.md", "tempoquant") == printed


def test_commands_are_printed_as_one_types_them():
    command = ["plan", "a folder/model"]
    assert text_of(command) == "tempoquant plan 'a folder/model'"
    assert shlex.split(text_of(command))[1:] == command
