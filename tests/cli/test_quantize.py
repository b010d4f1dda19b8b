import json

import pytest

from tempoquant import quantizing
from tempoquant.quantizing import Machine
from tempoquant.recipe import Recipe
from tests.cli.typed import assert_refused, run, split


def test_version_and_help():
    assert run("--version").stdout.startswith("tempoquant ")
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("demo", "quantize", "generate", "inspect", "compare"))


def test_quantize_passes_everything_on(quantize_calls, tmp_path):
    (tmp_path / "lora.safetensors").touch()
    flags = split("--calibration p.jsonl --device cpu,cpu --seed 3 --overwrite --link --recipe svdquant --memory disk")
    flags += ["--lora", f"low_noise={tmp_path / 'lora.safetensors'}:0.5"]
    flags += split("--hidden-ram-gib 0.5 --tokens-at-once 100")
    assert run("quantize", "tiny", "-o", tmp_path / "out", *flags).exit_code == 0
    arguments = {
        "calibration": "p.jsonl", "seed": 3, "overwrite": True, "link": True, "store": None,
        "lora": {"low_noise": [(tmp_path / "lora.safetensors", 0.5)]},
        "machine": Machine(("cpu", "cpu"), "disk", hidden_ram_gib=0.5, num_tokens_at_once=100),
    }  # fmt: skip
    assert quantize_calls == [("tiny", tmp_path / "out", Recipe.load("svdquant"), arguments)]


def test_flags_override_the_recipe_and_its_name_says_so(quantize_calls, tmp_path):
    flags = split("--format int4 --rank 8 --num-prompts 2 --steps 5 --frames 9 --size 32x48 --flow-shift 3.5")
    flags += split("--samples-per-expert 7 --guidance-scale 1.5")
    assert run("quantize", "tiny", "-o", tmp_path / "out", *flags).exit_code == 0
    [(_, _, recipe, _)] = quantize_calls
    wanted = Recipe.load("default").replace(
        name=recipe.name, format="int4", rank=8, num_prompts=2, num_steps=5, num_frames=9, height=32, width=48,
        flow_shift=3.5, samples_per_denoiser=7, guidance_scale=1.5,
    )  # fmt: skip
    assert recipe == wanted
    assert recipe.name.startswith("default (format int4, rank 8")


def test_a_flag_that_repeats_the_recipe_changes_nothing(quantize_calls, tmp_path):
    assert run("quantize", "tiny", "-o", tmp_path / "out", "--rank", Recipe.load("default").rank).exit_code == 0
    assert quantize_calls[0][2] == Recipe.load("default")


def test_quantize_prints_one_json_object(quantize_calls, tmp_path):
    record = json.loads(run("quantize", "tiny", "-o", tmp_path / "out", "--json").stdout)
    assert record["existed"] is False
    assert record["recipe"]["name"] == "test"
    assert [denoiser["denoiser"] for denoiser in record["denoisers"]] == ["high_noise", "low_noise"]


def test_quantize_says_when_a_result_was_there_already(quantize_calls, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "was already finished" in run("quantize", "tiny", "-o", tmp_path).stdout
    assert "Written to" in run("quantize", "tiny", "-o", tmp_path, "--overwrite").stdout


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--recipe", "nonsense"], 1, "'nonsense' is neither a built-in recipe"),
        (["--recipe", "missing.toml"], 1, "there is no recipe file missing.toml"),
        (["--format", "fp3"], 1, "unknown format 'fp3'"),
        (["--rank", "-1"], 2, "Invalid value for '--rank'"),
        (["--size", "480"], 2, "'480' is not HEIGHTxWIDTH"),
        (["--size", "0x16"], 2, "'0x16' is not HEIGHTxWIDTH"),
        (["--frames", "16"], 2, "16 is not of the form 4·k + 1: take 17"),
        (["--device", "cuda:99"], 2, "there is no cuda:99 here"),
        (["--device", "toaster"], 2, "'toaster' is not a device"),
        (["--seed", "one"], 2, "Invalid value for '--seed'"),
        (["--memory", "some"], 2, "Invalid value for '--memory'"),
        (["--lora", "x"], 2, "'x' is not DENOISER=FILE"),
        (["--lora", "low_noise=missing"], 2, "there is no LoRA file missing"),
        (["--device", "cpu,cpu,cpu"], 1, "give one device, or one for each denoiser"),
    ],
)
def test_quantize_refuses_bad_flags_before_any_work(quantize_calls, tmp_path, flags, code, words):
    assert_refused(run("quantize", "tiny", "-o", tmp_path / "out", *flags), code, words)
    assert quantize_calls == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_one_sentence(tmp_path):
    result = run("quantize", tmp_path / "missing", "-o", tmp_path / "out", "--recipe", "rtn")
    assert_refused(result, 1, "there is no model folder")
    assert not (tmp_path / "out").exists()


def test_an_error_is_a_json_object_too(tmp_path):
    result = run("quantize", tmp_path / "missing", "-o", tmp_path / "out", "--recipe", "rtn", "--json")
    assert result.exit_code == 1
    assert "there is no model folder" in json.loads(result.stdout)["error"]


def test_ctrl_c_ends_with_130_and_a_sentence(monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantizing, "quantize", interrupted)
    assert_refused(run("quantize", "tiny", "-o", tmp_path / "out"), 130, "interrupted")


def test_a_run_needs_to_know_where_to_write_unless_it_is_dry(quantize_calls):
    assert_refused(run("quantize", "tiny"), 2, "name the output folder with -o DIR")
    assert quantize_calls == []


def test_a_dry_run_says_what_a_run_needs_and_does_nothing(quantize_calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("quantize", "tiny", "-o", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert [stage["name"] for stage in record["stages"]] == [
        "record", "quantize high_noise", "quantize low_noise", "write",
    ]  # fmt: skip
    assert all(stage["seconds"] > 0 and stage["peak_memory_gib"] > 0 for stage in record["stages"])
    assert quantize_calls == [] and list(tmp_path.iterdir()) == []
    text = run("quantize", "tiny", "--dry-run", "--recipe", "rtn").stdout
    assert "quantize high_noise" in text and "record" not in text


def test_progress_can_be_read_by_programs(tmp_path):
    log = tmp_path / "log.jsonl"
    assert run("quantize", "tiny", "-o", tmp_path / "out", "--recipe", "rtn", "--json-log", log).exit_code == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"Blocks finished", "Quantizing high_noise", "Quantizing low_noise"} <= {line.get("stage") for line in lines}
    assert all(line["done"] == line["total"] for line in lines if line["event"] == "done")


@pytest.mark.parametrize("flags", ["--calibration p.jsonl", "--num-prompts 3", "--seed 1"])
def test_what_a_store_decides_is_not_asked_again(quantize_calls, tmp_path, flags):
    result = run("quantize", "tiny", "-o", tmp_path / "out", "--store", tmp_path / "store", *split(flags))
    assert_refused(result, 2, "the sample store fixes it")
    assert quantize_calls == []
    assert run("quantize", "tiny", "-o", tmp_path / "out", "--store", tmp_path / "store").exit_code == 0
    assert quantize_calls[0][3]["store"] == tmp_path / "store"
