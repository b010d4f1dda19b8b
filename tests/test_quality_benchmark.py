"""The referee of recipes: what it keeps, what it counts, what it shows. On the bundled model with
tiny videos.
"""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.quality.measure import (
    BITS_OF_16BIT,
    bits_per_weight,
    dequantizing_once,
    installed,
    num_stored_bytes,
    quantize,
)
from benchmarks.quality.reference import Reference, prepare, record
from benchmarks.quality.results import RowFiles, differences, read_peers
from benchmarks.quality.rows import Row, all_rows, select
from benchmarks.quality.run import Run
from benchmarks.quality.table import print_tables
from benchmarks.quality.task import Task, key_of
from benchmarks.quality.videos import Decoder
from tempoquant.errors import RecipeError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import generate_video, predict_noise
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.progress import SILENT
from tempoquant.recipe import Recipe
from tempoquant.recording.prompt_sets import evaluation_prompts
from tests.recorded import PROMPTS, SETTINGS, SOURCE

TASK = Task(SOURCE, "f" * 64, SETTINGS, PROMPTS[:1], evaluation_prompts("tiny", None, 1), 6)
RTN = Recipe.load("rtn")
ROW = Row("round to nearest", RTN, "published", "round to nearest")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline(SOURCE, "cpu")


@pytest.fixture(scope="module")
def reference(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return prepare(TASK, 0, pipeline, tmp_path_factory.mktemp("work"), SILENT)


@pytest.fixture
def work(reference: Reference, tmp_path: Path) -> Path:
    """Return a work folder in which nothing is measured, but the 16-bit side is finished."""
    return shutil.copytree(reference.folder.parent.parent, tmp_path / "work")


def run_in(work: Path, load: Any) -> Run:
    return Run(TASK, work, 1, load, SILENT)


def never() -> Any:
    raise AssertionError("the 16-bit pipeline was loaded")


def text_of(results: list[dict[str, Any]], against: str | None = None) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    print_tables(results, "the title", against, console)
    return console.export_text()


def test_a_finished_row_is_not_measured_again_unless_asked(pipeline: Any, work: Path):
    first = run_in(work, lambda: pipeline)
    first.measure([ROW])
    again = run_in(work, never)
    again.measure([ROW])
    assert again.results([ROW]) == first.results([ROW]) != []
    with pytest.raises(AssertionError, match="was loaded"):
        run_in(work, never).measure([ROW], again=True)


def test_a_row_that_fails_shows_why_and_stops_no_other(pipeline: Any, work: Path):
    wide = Row("too wide", RTN.replace(rank=10_000), "published", "too wide")
    run = run_in(work, lambda: pipeline)
    run.measure([wide, ROW])
    failed, good = run.results([wide, ROW])
    assert "rank 10000 exceeds" in failed["error"] and good["bits_per_weight"] == pytest.approx(4.25, abs=0.01)
    assert "rank 10000 exceeds" in text_of([failed, good])


def test_figures_are_drawn_of_what_is_finished(pipeline: Any, work: Path):
    figures = pytest.importorskip("benchmarks.quality.figures", exc_type=ModuleNotFoundError)
    run = run_in(work, lambda: pipeline)
    run.measure([ROW])
    figures.draw_error_against_bits(run.results([ROW]), "the title", work / "error.png")
    figures.draw_maps("the row", run.records(ROW), work / "map.png")
    assert (work / "error.png").stat().st_size > 10_000 and (work / "map.png").stat().st_size > 10_000


def test_peers_stand_in_the_table_with_their_reasons(tmp_path: Path):
    file = tmp_path / "peers.jsonl"
    cell = {"mean": 12.5, "standard_error": 0.25, "n": 8}
    good = {"row": "somebody's", "format": "mxfp4", "rank": None, "bits_per_weight": 4.25, "seconds": 3.0,
            "sqnr_db": {"high_noise": cell, "low_noise": cell}, "final_latent_db": cell}  # fmt: skip
    bad = {"row": "nobody's", "format": "nvfp4", "error": "it does not install here"}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    text = text_of(read_peers(file))
    assert "12.50 ± 0.25" in text and "it does not install here" in text and "n = 8" in text


def test_a_key_changes_with_the_recipe_the_seed_and_the_task_but_not_with_a_name():
    keys = {
        key_of(TASK, recipe, seed)
        for recipe in (None, RTN, RTN.replace(format="int4"), RTN.replace(rank=2), RTN.replace(layers=()))
        for seed in (0, 1)
    }
    assert len(keys) == 2 * 4
    assert key_of(TASK, RTN.replace(name="other"), 0) == key_of(TASK, RTN, 0)
    longer = dataclasses.replace(TASK, settings=SETTINGS.replace(num_steps=5))
    assert key_of(longer, RTN, 0) not in keys
    assert key_of(TASK, RTN, 0, (0.0, 500.0)) not in keys | {key_of(TASK, RTN, 0, (0.0, 400.0))}


def test_eight_bits_at_some_timesteps_are_a_row_of_their_own_that_gains_there(pipeline: Any, work: Path):
    wide = Row("eight bits", RTN, "eight bits", "eight bits", (0.0, 1001.0))
    run = run_in(work, lambda: pipeline)
    run.measure([ROW, wide])
    in_four, in_eight = run.results([ROW, wide])
    assert in_eight["bits_per_weight"] == in_four["bits_per_weight"]
    for denoiser in ("high_noise", "low_noise"):
        assert in_eight["sqnr_db"][denoiser]["mean"] > in_four["sqnr_db"][denoiser]["mean"] + 1
    assert all(each.startswith("ours, W4A4 with A8") for each in labels_of("eight bits"))


def labels_of(group: str) -> list[str]:
    return [row.label for row in all_rows(["mxfp4"], [2]) if row.group == group]


def test_a_result_whose_settings_meant_something_else_is_none(pipeline: Any, work: Path):
    run_in(work, lambda: pipeline).measure([ROW])
    [file] = (work / "rows").glob("*.json")
    found = json.loads(file.read_text())
    files = RowFiles(work / "rows", TASK)
    del found["recipe"]["gptq"]  # as if the setting had come later: it has its default
    file.write_text(json.dumps(found))
    assert files.load(ROW, 0) is not None
    found["recipe"]["gptq"] = True  # as if that had been the default then
    file.write_text(json.dumps(found))
    assert files.load(ROW, 0) is None


def test_bits_are_those_of_all_stored_bytes(reference: Reference):
    recipe = RTN.replace(rank=2, keep_16bit_blocks=(1, 0))
    denoiser = quantize(TASK, reference, recipe, "high_noise", SILENT)
    counts = {name: each.out_features * each.in_features for name, each in SOURCE.linears("high_noise").items()}
    kept = sum(count for name, count in counts.items() if name not in denoiser.layers)
    assert kept > 0
    stored = 8 * sum(layer.num_bytes for layer in denoiser.layers.values())
    wanted = (stored + BITS_OF_16BIT * kept) / sum(counts.values())
    assert bits_per_weight({"high_noise": denoiser}) == pytest.approx(wanted, rel=1e-12)


def test_a_bias_counts_where_the_model_had_none(reference: Reference):
    layer = next(iter(quantize(TASK, reference, RTN, "high_noise", SILENT).layers.values()))
    bias = torch.zeros(layer.out_features)
    with_bias = dataclasses.replace(layer, bias=bias)
    assert num_stored_bytes(with_bias, had_bias=True) == layer.num_bytes
    assert num_stored_bytes(with_bias, had_bias=False) == layer.num_bytes + bias.nbytes


def test_a_trajectory_comes_back_from_its_file(pipeline: Any, reference: Reference):
    [found] = reference.trajectories()
    wanted = record(TASK, pipeline, found.prompt, found.seed)
    assert torch.equal(found.final_latent, wanted.final_latent) and len(found.calls) == len(wanted.calls) == 8
    for one, other in zip(found.calls, wanted.calls, strict=True):
        assert one.sample.inputs.keys() == other.sample.inputs.keys()
        assert all(torch.equal(value, other.sample.inputs[key]) for key, value in one.sample.inputs.items())
        assert torch.equal(one.noise_prediction, other.noise_prediction)


def test_weights_dequantized_once_change_no_bit_and_the_pipeline_stays_as_it_was(pipeline: Any, reference: Reference):
    [trajectory] = reference.trajectories()
    sample, before = trajectory.calls[0].sample, pipeline.transformer
    denoisers = {e: quantize(TASK, reference, RTN, e, SILENT) for e in COMPONENTS}
    with installed(pipeline, denoisers):
        slow = predict_noise(pipeline, sample)
        with dequantizing_once(denoisers):
            assert torch.equal(predict_noise(pipeline, sample), slow)
    assert pipeline.transformer is before
    assert torch.equal(predict_noise(pipeline, sample), trajectory.calls[0].noise_prediction)


def test_a_decoded_latent_is_the_pipelines_own_video(pipeline: Any, reference: Reference):
    [trajectory] = reference.trajectories()
    video = Decoder(pipeline, in_bundled_world=True).decode(trajectory.final_latent)
    wanted = generate_video(pipeline, trajectory.prompt, SETTINGS, trajectory.seed)
    assert np.array_equal(video, wanted)


def test_differences_are_paired():
    def result(values: list[float]) -> dict[str, Any]:
        cells = {"high_noise": values, "low_noise": values}
        return {"row": "a", "seeds": {"0": {"sqnr_db": cells, "final_latent_db": values}}}

    better, base = result([11.0, 21.0]), result([10.0, 20.0])
    differences([better], base)
    assert better["difference_db"]["low_noise"] == {"mean": 1.0, "standard_error": 0.0, "n": 2}


def test_every_row_has_a_name_of_its_own_and_an_unknown_one_is_refused():
    rows = all_rows()
    assert len({row.label for row in rows}) == len(rows)
    assert {row.method for row in select(rows, ["paper"], None)} == {"paper"}
    assert not any(row.group == "variant" for row in select(rows, None, None))
    with pytest.raises(RecipeError, match="no row matches 'papre'"):
        select(rows, ["papre"], None)
