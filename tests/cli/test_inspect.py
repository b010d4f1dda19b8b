import json

import pytest

from tempoquant.checkpoint.manifest import write_manifest
from tests.cli.typed import assert_refused, run
from tests.evaluate.quantized_folder import write_quantized_folder


def test_inspect_shows_what_is_inside(quantized):
    shown = " ".join(run("inspect", quantized).stdout.split())
    for words in (
        "recipe test",
        "high_noise",
        "low_noise",
        "bits per weight",
        "917.5–958.25",
        "calibrated on 1 prompt",
    ):
        assert words in shown
    assert "low_noise: a note" in shown


def test_inspect_prints_one_json_object(quantized):
    record = json.loads(run("inspect", quantized, "--json").stdout)
    assert record["denoisers"][0]["num_layers"] == 19
    assert len(record["denoisers"][0]["bins"]) == 3
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


def test_a_manifest_extends_the_check_to_every_file(tmp_path):
    folder = write_quantized_folder(tmp_path / "model")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    write_manifest(folder, {})
    assert "vae/config.json" in json.loads(run("inspect", folder, "--verify", "--json").stdout)["verified_files"]
    (folder / "vae" / "config.json").write_text("{ }")
    assert_refused(run("inspect", folder, "--verify"), 1, "SHA-256 differs")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_inspect_of_no_model_is_one_sentence(tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert_refused(run("inspect", tmp_path / name), 1, "error: ")
