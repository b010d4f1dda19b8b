"""Laws of a quantized text encoder's figures: the loss of embeddings, and of denoisers alone."""

import pytest

from tempoquant.cli.evaluate import with_reference_text
from tempoquant.cli.tables import comparison_table
from tempoquant.evaluate.benchmark_sets import load_benchmark
from tempoquant.evaluate.compare import Task, compare
from tempoquant.evaluate.evaluation import evaluate
from tempoquant.evaluate.metrics.measures import CEILING_DB
from tempoquant.evaluate.plan import Model
from tempoquant.evaluate.request import Request
from tempoquant.models.source import SourceModel
from tempoquant.quantizing import quantize
from tempoquant.recipe import Recipe
from tests.recorded import CPU, PROMPTS, SETTINGS, SOURCE

pytest.importorskip("torchao")
STEPS = SETTINGS.replace(num_steps=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, SourceModel]:
    folder, rtn = tmp_path_factory.mktemp("models"), Recipe.load("rtn")
    made = {format: quantize("tiny", folder / format, rtn.replace(text_encoder=format), device="cpu")
            for format in ("16bit", "int8")}  # fmt: skip
    return {format: SourceModel.open(path) for format, path in made.items()}


def test_with_the_references_text_encoder_a_model_is_the_one_that_was_quantized_without(models, tmp_path):
    int8 = Model("int8", models["int8"])
    sides = [int8, with_reference_text(int8, SOURCE), Model("rtn", models["16bit"])]
    benchmark = load_benchmark("tiny", None, 1.0, 1)
    record = evaluate(Request(Model("16-bit", SOURCE), sides, benchmark, STEPS, limit=1), tmp_path / "out", CPU)
    [item] = record["items"]
    found = {label: item["metrics"][label] for label in ("int8", "int8-reference-text", "rtn")}
    assert 25 < found["int8"]["embedding_db"] < 60
    assert found["int8-reference-text"] == found["rtn"] and found["rtn"]["embedding_db"] == CEILING_DB
    assert found["int8"]["final_latent_db"] != found["rtn"]["final_latent_db"]
    assert "embedding_db" in {row["metric"] for row in record["summary"]}


def test_a_comparison_tells_embeddings_only_where_a_text_encoder_is_quantized(models):
    task = Task(PROMPTS[:2], STEPS, num_trajectories=1)
    comparison = compare(SOURCE, {"int8": models["int8"], "rtn": models["16bit"]}, task, "cpu").comparison
    int8, rtn = comparison.models
    assert int8.embedding_db.num_values == 2 and 25 < int8.embedding_db.mean < 60
    assert rtn.embedding_db.mean > 1000  # nothing lost
    assert "SQNR of text embeddings, dB" in [str(cell) for cell in comparison_table(comparison).columns[0].cells]
    plain = compare(SOURCE, {"rtn": models["16bit"]}, Task(PROMPTS[:1], STEPS, num_trajectories=1), "cpu").comparison
    assert plain.models[0].embedding_db is None
