"""`tempoquant export` on the bundled model, and what the other commands make of an export."""

import json
from pathlib import Path

import pytest

from tempoquant.models import sampling_file
from tests.cli.typed import assert_refused, run


def run_json(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pipeline without smoothing, branch and clip search, which need calibration: all of
    it can be exported.
    """
    folder = tmp_path_factory.mktemp("quantized") / "rtn"
    run_json("quantize", "tiny", "-o", folder, "--recipe", "rtn", "--format", request.param)
    return folder


@pytest.fixture(scope="module")
def exported(quantized: Path) -> Path:
    folder = quantized.with_name("exported")
    record = run_json("export", quantized, "--to", "nunchaku-lite", "-o", folder)
    assert (record["existed"], record["output"], record["target"]) == (False, str(folder), "nunchaku-lite")
    assert record["clip_ratios_carried"] is False
    return folder


def test_the_second_time_it_is_there_and_it_verifies(quantized, exported):
    assert run_json("export", quantized, "--to", "nunchaku-lite", "-o", exported)["existed"] is True
    verified = run_json("inspect", exported, "--verify")["verified_files"]
    assert {"transformer/diffusion_pytorch_model.safetensors", "vae/config.json"} <= set(verified)


def test_the_console_says_that_clip_ratios_are_not_carried(quantized, exported):
    result = run("export", quantized, "--to", "nunchaku-lite", "-o", exported)
    shown = " ".join(result.stdout.split())
    assert "high_noise: exported to nunchaku-lite: clip ratios are not carried (all were 1)" in shown
    assert "was already finished" in shown


def test_compare_scores_an_export_near_its_source(quantized, exported, monkeypatch):
    """The kernels round a group by the scale before its own rounding, which shows in NVFP4 and
    hardly in INT4.
    """
    own = sampling_file.default_settings
    few = {"num_steps": 2, "num_frames": 5}
    monkeypatch.setattr(sampling_file, "default_settings", lambda source: own(source).replace(**few))
    scores = []
    for folder in (quantized, exported):
        [model] = run_json("compare", "tiny", folder, "--samples", 1)["models"]
        scores.append([error["sqnr_db"]["mean"] for error in model["noise_prediction"]])
    assert len(scores[0]) == 2
    for ours, theirs in zip(*scores, strict=True):
        assert ours != theirs
        assert abs(ours - theirs) < 2


def test_an_altered_byte_of_an_export_is_found(quantized, tmp_path):
    run_json("export", quantized, "--to", "nunchaku-lite", "-o", tmp_path / "out")
    file = tmp_path / "out" / "transformer_2" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert_refused(run("inspect", tmp_path / "out", "--verify"), 1, "SHA-256 differs")


def test_a_layer_that_cannot_be_exported_is_named_with_the_recipe_to_use(tmp_path):
    run_json("quantize", "tiny", "-o", tmp_path / "mxfp4", "--recipe", "rtn")
    result = run("export", tmp_path / "mxfp4", "--to", "nunchaku-lite", "-o", tmp_path / "out")
    assert_refused(result, 1, "blocks.0.attn1.to_k of high_noise is in mxfp4")
    assert "--recipe nunchaku_int4" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_files_for_comfyui_are_listed_and_the_second_time_they_are_there(tmp_path):
    run_json("quantize", "tiny", "-o", tmp_path / "rtn", "--recipe", "rtn", "--format", "nvfp4")
    arguments = ("export", tmp_path / "rtn", "--to", "comfyui-nvfp4", "-o", tmp_path / "out")
    first, second = run_json(*arguments), run_json(*arguments)
    assert (first["existed"], second["existed"]) == (False, True)
    assert (first["target"], first["output"], first["clip_ratios_carried"]) == (
        "comfyui-nvfp4", str(tmp_path / "out"), False,
    )  # fmt: skip
    assert first["denoisers"] == second["denoisers"]
    for each, name in zip(first["denoisers"], ("high_noise", "low_noise"), strict=True):
        assert (each["denoiser"], each["num_layers"], each.get("branch_file")) == (name, 40, None)
        assert (tmp_path / "out" / each["model_file"]).stat().st_size == each["num_bytes"]
        assert each["bits_per_weight"] == pytest.approx(4.5, abs=0.1)
    shown = " ".join(run(*arguments).stdout.split())
    assert "diffusion_models/tempoquant_high_noise_nvfp4.safetensors" in shown and "was already finished" in shown
    assert_refused(run(*arguments, "--link"), 1, "leave it out")


def test_a_layer_that_comfyui_cannot_hold_is_named_with_the_recipe_to_use(tmp_path):
    run_json("quantize", "tiny", "-o", tmp_path / "m1", "--recipe", "rtn", "--format", "nvfp4_m1")
    result = run("export", tmp_path / "m1", "--to", "comfyui-nvfp4", "-o", tmp_path / "out")
    assert_refused(result, 1, "is in nvfp4_m1, and comfyui-nvfp4 has nvfp4 only")
    assert "--recipe comfyui_nvfp4" in " ".join(result.stderr.split()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("--to", "somewhere", "-o", "out"), ("--to", "nunchaku-lite"), ("-o", "out")])
def test_a_target_and_an_output_must_be_given(tmp_path, arguments):
    assert run("export", tmp_path, *arguments).exit_code == 2
