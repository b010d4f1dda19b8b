"""The tables of `sensitivity`: layers, ranks and decibels."""

from rich.console import Console, RenderableType

from tempoquant.calibrate.sensitivity import LayerSensitivity
from tempoquant.calibrate.sensitivity_file import Sensitivity
from tempoquant.cli.sensitivity_table import budget_text, sensitivity_record, sensitivity_text
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.recipe import LayerRule, Recipe

LAYERS = [
    {"blocks.0.q": LayerSensitivity(1.0, {0: 1e-1, 2: 1e-2, 8: 1e-3})},
    {"blocks.1.q": LayerSensitivity(1.0, {0: 1e-1, 2: 1e-2})},
    {"blocks.1.v": LayerSensitivity(1.0, {0: 1e-1, 2: 1e-2})},
]
FOUND = Sensitivity(dict.fromkeys(COMPONENTS, LAYERS), {})


def lines(text: RenderableType) -> list[str]:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(text)
    return capture.get().splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_a_layer_that_a_block_lacks_has_no_number_and_a_block_has_the_sum_of_its_own() -> None:
    rows = [cells(line) for line in lines(sensitivity_text(FOUND, 2)) if line.startswith("│")]
    assert rows[:2] == [["0", "20.0", "–", "20.0"], ["1", "20.0", "20.0", "17.0"]]


def test_only_ranks_that_every_layer_was_measured_at_are_summed_up() -> None:
    assert any(line.startswith("All layers together, by rank: 5.2 at 0, 15.2 at 2 dB") for line in
               lines(sensitivity_text(FOUND, 2)))  # fmt: skip


def test_what_a_budget_bought_is_shown_with_the_sqnr_that_is_foretold() -> None:
    rules = (LayerRule("low_noise.blocks.0.q", rank=8), LayerRule("low_noise.blocks.1.v", "16bit"))
    text = lines(budget_text(FOUND, Recipe("ours", rank=2, layers=rules)))
    rows = [cells(line) for line in text if line.startswith("│")]
    assert rows == [["0", "2", "–"], ["1", "2", "2"], ["0", "8", "–"], ["1", "2", "16bit"]]
    assert [line for line in text if line.startswith("All layers")] == [
        "All layers together: 15.2 dB, to nearest, without GPTQ.",
        "All layers together: 19.6 dB, to nearest, without GPTQ.",
    ]


def test_the_record_has_what_the_tables_have() -> None:
    record = sensitivity_record(FOUND, 2)
    assert round(record["denoisers"]["high_noise"]["sqnr_db"], 1) == 15.2
