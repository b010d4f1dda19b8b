"""The commands on the bundled model itself, with few steps: what they write, they read."""

import json
from pathlib import Path

import imageio.v2 as imageio
import pytest
from typer.testing import CliRunner

from tempoquant.cli import app
from tempoquant.models import sampling_file
from tempoquant.tiny import calibration_items, evaluation_items, weights_folder


def run_json(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def few_steps(monkeypatch):
    """Return the model's own settings, with two steps of five frames."""
    own = sampling_file.default_settings
    few = {"num_steps": 2, "num_frames": 5}
    monkeypatch.setattr(sampling_file, "default_settings", lambda source: own(source).replace(**few))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rtn") / "rtn"
    record = run_json("quantize", "tiny", "-o", folder, "--recipe", "rtn")
    assert record["existed"] is False
    return folder


def test_what_quantize_wrote_is_there_the_second_time_and_verifies(quantized):
    assert run_json("quantize", "tiny", "-o", quantized, "--recipe", "rtn")["existed"] is True
    record = run_json("inspect", quantized, "--verify")
    assert record["bits_per_weight"] == pytest.approx(4.25, abs=0.01)
    assert "vae/diffusion_pytorch_model.safetensors" in record["verified_files"]


def test_generate_writes_a_video_from_a_quantized_model(quantized, tmp_path):
    [item] = evaluation_items(1)
    item.image.save(tmp_path / "first.png")
    arguments = ["generate", quantized, "--image", tmp_path / "first.png", "--prompt", item.prompt]
    flags = ["--steps", "2", "--frames", "5", "--size", "32x48", "-o", tmp_path / "a.mp4"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments + flags])
    assert result.exit_code == 0, result.output
    frames = list(imageio.get_reader(tmp_path / "a.mp4").iter_data())
    assert (len(frames), frames[0].shape) == (5, (32, 48, 3))


def test_a_model_compared_with_itself_is_identical(few_steps):
    [model] = run_json("compare", "tiny", weights_folder(), "--samples", 1)["models"]
    assert model["psnr_db"]["mean"] == "inf"
    assert model["ssim"]["mean"] == pytest.approx(1.0)
    assert {error["sqnr_db"]["mean"] for error in model["noise_prediction"]} == {"inf"}


def test_a_quantized_model_is_near_and_not_identical(few_steps, quantized):
    record = run_json("compare", "tiny", quantized, "--samples", 1)
    [model] = record["models"]
    assert all(0 < error["sqnr_db"]["mean"] < 60 for error in model["noise_prediction"])
    assert 5 < model["psnr_db"]["mean"] < 80
    assert set(record["reference"]) >= {"motion_followed", "appearance_kept"}


def test_prompts_that_were_calibrated_on_are_refused(few_steps, tmp_path):
    """The held-out items are those of the calibration set."""
    [item] = calibration_items(1)
    item.image.save(tmp_path / "first.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": "first.png", "prompt": item.prompt}))
    flags = ["--num-prompts", "1", "--steps", "2", "--frames", "5", "--recipe", "svdquant"]
    run_json("quantize", "tiny", "-o", tmp_path / "out", *flags)
    arguments = ["compare", "tiny", tmp_path / "out", "--samples", "1", "--samples-from", tmp_path / "p.jsonl"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert "were calibrated on" in " ".join(result.stderr.split())
