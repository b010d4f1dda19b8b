"""The plan command: tables for people, values for programs, and refusals."""

import json

import pytest

from tempoquant.cli.memory_table import Machine, recommendation
from tempoquant.models.pipeline_configs import published_models, read_configs
from tempoquant.models.wan.pipelines import I2V_A14B
from tempoquant.planning.memory_plan import plan_memory
from tempoquant.recipe import Recipe
from tests.cli.typed import assert_refused, run, split


def test_plan_prints_every_phase_of_every_mode_and_recommends_one():
    result = run("plan", "tiny", *split("--size 64x64 --frames 9 --recipe tiny --gpu-gib 4"))
    assert result.exit_code == 0, result.output
    for words in ("text encoding", "high-noise denoising", "video decoding", "resident", "swap", "lean", "predicted",
                  "on a GPU of 4.0 GiB: --memory resident"):  # fmt: skip
        assert words in result.stdout


def test_plan_as_json_adds_up():
    result = run("plan", "tiny", *split("--size 64x64 --frames 9 --recipe tiny --gpu-gib 4 --json"))
    record = json.loads(result.stdout)
    assert (record["height"], record["num_frames"], record["kind"]) == (64, 9, "predicted")
    assert [model["label"] for model in record["models"]] == ["16-bit", "tiny"]
    for model in record["models"]:
        assert model["recommended"] == "resident"
        for mode in model["modes"]:
            peaks = {phase["name"]: phase["weights_bytes"] + phase["activations_bytes"] for phase in mode["phases"]}
            assert mode["peak_bytes"] == max(peaks.values()) == peaks[mode["deciding_phase"]]
    by_mode = [{mode["mode"]: mode["peak_bytes"] for mode in model["modes"]} for model in record["models"]]
    for mode, reduction in record["reduction"].items():
        assert reduction == pytest.approx(1 - by_mode[1][mode] / by_mode[0][mode])


SMALL = "--size 64x64 --frames 9 --recipe tiny"


def test_ram_decides_with_the_gpu_and_what_fits_nowhere_exits_with_1():
    result = run("plan", "tiny", *split(f"{SMALL} --gpu-gib 4 --ram-gib 4"))
    assert result.exit_code == 0 and "on a GPU of 4.0 GiB and 4.0 GiB of RAM: --memory resident" in result.stdout
    refused = run("plan", "tiny", *split(f"{SMALL} --ram-gib 2 --json"))
    record = json.loads(refused.stdout)
    assert refused.exit_code == 1 and record["ram_bytes"] == 2 * 2**30
    assert [each.get("recommended") for each in record["models"]] == [None, None]


def test_a_sentence_says_what_is_missing_of_which_memory():
    plan = plan_memory(read_configs("tiny"), I2V_A14B.replace(height=64, width=64, num_frames=9), Recipe.load("tiny"))
    said = recommendation(plan.quantized, Machine(2**30, 2**31))
    assert "no mode fits; " in said and " of the GPU in " in said
    assert " of RAM (3.0 GiB are reserved for the system)" in said


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("nowhere", 1, "there is no model folder"),
        ("tiny --size 65x64", 1, "is a multiple of 16"),
        ("tiny --frames 8", 2, "is not of the form"),
        ("tiny --recipe unheard-of", 1, "unheard-of"),
        ("tiny --gpu-gib 0", 2, "gpu-gib"),
    ],
)
def test_plan_refuses(flags, code, words):
    assert_refused(run("plan", *split(flags)), code, words)


@pytest.mark.parametrize(
    ("head_dim", "words"),
    [
        (
            12,
            "blocks.0.attn1.to_q of transformer has in_features = 24, which groups of 16 (nvfp4_m1) do not divide",
        ),
        (8, "rank 32 exceeds the smaller side of blocks.0.attn1.to_q of transformer, 16 × 16."),
    ],
)
def test_a_layer_that_no_recipe_fits_is_named_with_its_remedy(head_dim, words, tmp_path):
    for component, config in published_models()["wan2.1-t2v-1.3b"].models.items():
        (tmp_path / component).mkdir(exist_ok=True)
        changes = {"attention_head_dim": head_dim, "num_attention_heads": 2} if component == "transformer" else {}
        (tmp_path / component / "config.json").write_text(json.dumps({**config.config, **changes}))
    named = {name: model[:2] for name, model in published_models()["wan2.1-t2v-1.3b"].models.items()}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **named}))
    assert_refused(run("plan", tmp_path), 1, words)
