"""Every command as a user types it, on folders small enough to be quick; what models do is replaced by fakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tempoquant import quantizing
from tempoquant.cli import app
from tempoquant.errors import ModelError
from tempoquant.evaluate.results import Comparison, ModelResult, NoisePredictionError, Summary, VideoResult
from tempoquant.integrations import wan
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert
from tests.evaluate.quantized_folder import write_quantized_folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized_folder(tmp_path_factory.mktemp("quantized") / "model")


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    return tmp_path / "first.png"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def split(flags: str) -> list[str]:
    return flags.split()


def assert_refused(result: Result, code: int, words: str) -> None:
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_version_and_help():
    assert run("--version").stdout.startswith("tempoquant ")
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("demo", "quantize", "generate", "inspect", "compare"))


# quantize


@pytest.fixture
def quantize_calls(monkeypatch, quantized):
    """What quantizing.quantize was called with; it returns the module's quantized folder."""
    calls: list[tuple[str, Path, Recipe, dict[str, object]]] = []

    def fake(model, output, recipe, **arguments):
        del arguments["progress"]
        calls.append((model, output, recipe, arguments))
        return quantized

    monkeypatch.setattr(quantizing, "quantize", fake)
    return calls


def test_quantize_passes_everything_on(quantize_calls, tmp_path):
    flags = split("--calibration p.jsonl --device cpu,cpu --seed 3 --overwrite --link --recipe svdquant")
    assert run("quantize", "tiny", "-o", tmp_path / "out", *flags).exit_code == 0
    arguments = {"calibration": "p.jsonl", "device": "cpu,cpu", "seed": 3, "overwrite": True, "link": True}
    assert quantize_calls == [("tiny", tmp_path / "out", Recipe.load("svdquant"), arguments)]


def test_flags_override_the_recipe_and_its_name_says_so(quantize_calls, tmp_path):
    flags = split("--format int4 --rank 8 --num-prompts 2 --steps 5 --frames 9 --size 32x48 --flow-shift 3.5")
    assert run("quantize", "tiny", "-o", tmp_path / "out", *flags).exit_code == 0
    [(_, _, recipe, _)] = quantize_calls
    wanted = Recipe.load("paper").replace(
        name=recipe.name, format="int4", rank=8, num_prompts=2, num_steps=5, num_frames=9, height=32, width=48,
        flow_shift=3.5,
    )  # fmt: skip
    assert recipe == wanted
    assert recipe.name.startswith("paper (format int4, rank 8")


def test_a_flag_that_repeats_the_recipe_changes_nothing(quantize_calls, tmp_path):
    assert run("quantize", "tiny", "-o", tmp_path / "out", "--rank", Recipe.load("paper").rank).exit_code == 0
    assert quantize_calls[0][2] == Recipe.load("paper")


def test_quantize_prints_one_json_object(quantize_calls, tmp_path):
    record = json.loads(run("quantize", "tiny", "-o", tmp_path / "out", "--json").stdout)
    assert record["existed"] is False
    assert record["recipe"]["name"] == "test"
    assert [expert["expert"] for expert in record["experts"]] == ["high_noise", "low_noise"]


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


# inspect


def test_inspect_shows_what_is_inside(quantized):
    shown = run("inspect", quantized).stdout
    for words in (
        "recipe test",
        "high_noise",
        "low_noise",
        "bits / weight",
        "917.5 … 958.25",
        "calibrated on 1 prompts",
    ):
        assert words in shown
    assert "low_noise: a note" in shown


def test_inspect_prints_one_json_object(quantized):
    record = json.loads(run("inspect", quantized, "--json").stdout)
    assert record["experts"][0]["num_layers"] == 19
    assert len(record["experts"][0]["bins"]) == 3
    assert "verified_files" not in record


def test_inspect_verifies(quantized):
    record = json.loads(run("inspect", quantized, "--verify", "--json").stdout)
    assert record["verified_files"] == [
        f"{component}/diffusion_pytorch_model.safetensors" for component in ("transformer", "transformer_2")
    ]


def test_inspect_finds_an_altered_byte(tmp_path):
    folder = write_quantized_folder(tmp_path / "model")
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert run("inspect", folder).exit_code == 0
    assert_refused(run("inspect", folder, "--verify"), 1, "SHA-256 differs")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_inspect_of_no_model_is_one_sentence(tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert_refused(run("inspect", tmp_path / name), 1, "error: ")


# generate


@pytest.fixture
def generate_calls(monkeypatch, tmp_path):
    """What generate_video was called with, on a folder that counts as a model."""
    calls = []

    def fake(pipeline, prompt, settings, seed, negative_prompt, on_step):
        calls.append((prompt, settings, seed, negative_prompt))
        if settings.height % 16:
            raise ValueError(f"`height` has to be divisible by 16, not {settings.height}.")
        for _ in range(settings.num_steps):
            on_step()
        return np.zeros((settings.num_frames, 64, 64, 3), np.uint8)

    monkeypatch.setattr(wan, "load_pipeline", lambda folder, device: "pipeline")
    monkeypatch.setattr(wan, "generate_video", fake)
    return calls


def test_generate_writes_a_video_with_the_settings_that_were_given(generate_calls, tmp_path, image):
    flags = split(
        "--steps 2 --frames 5 --size 64x48 --seed 7 --guidance-scale 1.5 --flow-shift 3 --negative-prompt fog"
    )
    result = run("generate", tmp_path, "--image", image, "--prompt", "go", "-o", tmp_path / "a.mp4", *flags)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert "5 frames of 64×64, 2 steps, seed 7" in result.stdout
    [(prompt, settings, seed, negative_prompt)] = generate_calls
    assert (prompt.text, seed, negative_prompt) == ("go", 7, "fog")
    assert settings == wan.SamplingSettings(64, 48, 5, 2, 1.5, 3.0, settings.fps)


def test_generate_takes_what_is_not_given_from_the_model(generate_calls, tmp_path, image):
    own = wan.SamplingSettings(32, 32, 9, 3, 2.0, 4.0, 6)
    (tmp_path / wan.SAMPLING_FILE).write_text(json.dumps(own.__dict__))
    run("generate", tmp_path, "--image", image, "--prompt", "go", "-o", tmp_path / "a.mp4", "--steps", 4)
    assert generate_calls[0][1] == own.replace(num_steps=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--image": "missing.png"}, "there is no image"),
        ({"-o": "missing/a.mp4"}, "there is no folder"),
        ({"-o": "a.gif"}, "does not end in .mp4"),
        ({"--size": "40x64"}, "divisible by 16"),
    ],
)
def test_generate_refuses_bad_input(generate_calls, tmp_path, image, changes, words):
    options = {"--image": image, "--prompt": "go", "-o": "a.mp4", **changes}
    options |= {key: tmp_path / options[key] for key in ("--image", "-o")}
    flags = [each for pair in options.items() for each in pair]
    assert_refused(run("generate", tmp_path, *flags), 1, words)
    assert not list(tmp_path.rglob("*.mp4"))


def test_generate_without_a_prompt_is_a_usage_error(tmp_path, image):
    assert_refused(
        run("generate", tmp_path, "--image", image, "-o", tmp_path / "a.mp4"), 2, "Missing option '--prompt'"
    )


# compare and demo


def comparison(models: dict[str, Path]) -> Comparison:
    def result(label, folder, **video):
        errors = [
            NoisePredictionError(Expert.HIGH_NOISE, index, (900.0, 999.0), Summary.of([20.0, 21.0]), 8)
            for index in ((None, 0, 1) if video else ())
        ]
        return ModelResult(
            label, str(folder), 4.38, 2**20, tuple(errors), (VideoResult("p0", **video, motion_followed=True),)
        )

    reference = result("16-bit", "reference")
    others = tuple(result(label, folder, psnr_db=30.0, ssim=0.9) for label, folder in models.items())
    return Comparison(reference, others, {"p0": "a red circle moves left slowly"}, 0, {"num_steps": 2})


@pytest.fixture
def compare_calls(monkeypatch):
    """What evaluate.compare.compare was called with; it returns made-up numbers and black videos."""
    from tempoquant.evaluate import compare as module

    calls = []

    def fake(reference, models, task, device, progress):
        calls.append((reference, dict(models), task, device))
        videos = {label: [np.zeros((3, 64, 64, 3), np.uint8)] for label in ("16-bit", *models)}
        return module.Evidence(comparison(models), videos)

    monkeypatch.setattr(module, "compare", fake)
    return calls


def test_compare_shows_a_table_and_bins(compare_calls, quantized):
    shown = run("compare", "tiny", quantized, "--samples", 3).stdout
    for words in ("16-bit", "4.38", "20.5 ± 0.7", "30.0", "0.900", "1 of 1", "900 … 999", "1.0 MiB"):
        assert words in shown
    assert "appearance" not in shown  # nobody measured it here
    [(_, models, task, _)] = compare_calls
    assert models == {"model": quantized}
    assert (len(task.prompts), task.in_bundled_world) == (3, True)


def test_compare_prints_one_json_object(compare_calls, quantized):
    record = json.loads(run("compare", "tiny", quantized, "--json", "--samples", 1).stdout)
    assert record["models"][0]["noise_prediction"][0]["sqnr_db"]["num_values"] == 2
    assert record["reference"]["label"] == "16-bit"


def test_prompts_of_ones_own_are_of_no_bundled_world(compare_calls, quantized, tmp_path, image):
    (tmp_path / "model").mkdir()
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": image.name, "prompt": "a cat"}))
    result = run("compare", tmp_path / "model", quantized, "--samples", 1, "--samples-from", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.output
    assert compare_calls[0][2].in_bundled_world is False


@pytest.mark.parametrize(
    ("reference", "flags", "words"),
    [
        ("tiny", ["--samples-from", "missing.jsonl"], "there is no prompt file or folder"),
        ("nowhere/at/all", [], "has no built-in prompts"),
        ("nowhere/at/all", ["--samples-from", "p.jsonl", "--samples", "1"], "there is no model folder"),
        ("tiny", ["--samples-from", "p.jsonl", "--samples", "2"], "holds 1 prompts, 2 are wanted"),
    ],
)
def test_compare_refuses_bad_input(compare_calls, quantized, tmp_path, image, monkeypatch, reference, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": image.name, "prompt": "a cat"}))
    assert_refused(run("compare", reference, quantized, *flags), 1, words)
    assert compare_calls == []


def test_demo_leaves_everything_where_it_says(quantize_calls, compare_calls, tmp_path):
    result = run("demo", "-o", tmp_path / "demo", "--model", "tiny")
    assert result.exit_code == 0, result.output
    for name in ("side_by_side.mp4", "contact_sheet.png", "results.json"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
        assert name in result.stdout
    assert [(call[1].name, call[2].name) for call in quantize_calls] == [("rtn", "rtn"), ("paper", "paper")]
    record = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [model["label"] for model in record["models"]] == ["rtn", "paper"]


def test_demo_prints_the_json_that_it_stores(quantize_calls, compare_calls, tmp_path):
    result = run("demo", "-o", tmp_path, "--model", "tiny", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "results.json").read_text())


def test_a_second_demo_says_what_it_reused(quantize_calls, compare_calls, tmp_path):
    for name in ("rtn", "paper"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text("{}")
    assert "already quantized, reused" in run("demo", "-o", tmp_path, "--model", "tiny").stdout
    assert len(quantize_calls) == 2  # which checks that they are of the same run


def test_demo_with_the_baseline_as_recipe_compares_one_model(quantize_calls, compare_calls, tmp_path):
    record = json.loads(run("demo", "-o", tmp_path, "--model", "tiny", "--recipe", "rtn", "--json").stdout)
    assert [model["label"] for model in record["models"]] == ["rtn"]


def test_demo_tells_recipes_of_one_name_apart(quantize_calls, compare_calls, tmp_path):
    (tmp_path / "mine.toml").write_text('name = "rtn"\nformat = "int4"\n')
    result = run("demo", "-o", tmp_path / "demo", "--model", "tiny", "--recipe", tmp_path / "mine.toml")
    assert_refused(result, 1, "give it another name")
    assert quantize_calls == []


def test_demo_on_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "demo").write_text("")
    assert_refused(run("demo", "-o", tmp_path / "demo"), 1, "File exists")


def test_a_model_that_fails_leaves_no_pictures(quantize_calls, compare_calls, monkeypatch, tmp_path):
    from tempoquant.evaluate import compare as module

    def broken(*args, **kwargs):
        raise ModelError("paper: high_noise at timestep 950 holds NaN.")

    monkeypatch.setattr(module, "compare", broken)
    assert_refused(run("demo", "-o", tmp_path, "--model", "tiny"), 1, "holds NaN")
    assert list(tmp_path.iterdir()) == []
