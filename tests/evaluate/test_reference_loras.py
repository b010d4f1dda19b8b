"""A reference with LoRAs in its weights: what a model that was quantized with them is compared
with.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tempoquant
from tempoquant.errors import ModelError
from tempoquant.evaluate.reference_loras import warn_of_other_loras
from tempoquant.hosts.contents import configs_of
from tempoquant.hosts.diffusers.pipeline import load_pipeline, open_pipeline
from tempoquant.models.fingerprint import fingerprint, outline
from tempoquant.models.lora.given import with_loras
from tempoquant.models.sampling_file import default_settings, settings_of
from tests.cli.typed import run

SOURCE = open_pipeline("tiny")
PAIR = {"high_noise": "tiny-4steps", "low_noise": "tiny-4steps"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tempoquant.quantize("tiny", tmp_path_factory.mktemp("quantized") / "four", "rtn", lora=PAIR)


def test_loading_a_source_with_loras_is_loading_the_model_they_are_fused_into() -> None:
    source = with_loras(SOURCE, PAIR)
    pipeline, plain = load_pipeline(source, "cpu"), load_pipeline(SOURCE, "cpu")
    for denoiser in source.denoisers:
        changed = set()
        theirs = dict(getattr(plain, denoiser.component).named_parameters())
        for name, parameter in getattr(pipeline, denoiser.component).named_parameters():
            stored = source.component_of(denoiser.name).tensors[name].read()
            assert torch.equal(parameter, source.loras[denoiser.name].fuse(name, stored).to(parameter.dtype))
            if not torch.equal(parameter, theirs[name]):
                changed.add(name)
        assert changed == source.loras[denoiser.name].loras[0].changes.keys()


def test_a_source_with_loras_samples_as_they_say_unless_it_is_asked_otherwise() -> None:
    source, own = with_loras(SOURCE, PAIR), default_settings(SOURCE)
    few = own.replace(num_steps=4, guidance_scale=1.0, flow_shift=5.0)
    assert settings_of(source, {}) == few and settings_of(SOURCE, {}) == own
    assert settings_of(source, {"num_steps": 6, "guidance_scale": None}) == few.replace(num_steps=6)


def test_a_source_with_loras_is_another_model() -> None:
    half = with_loras(SOURCE, {name: (file, 0.5) for name, file in PAIR.items()})
    for identify in (fingerprint, outline):
        assert len({identify(SOURCE), identify(with_loras(SOURCE, PAIR)), identify(half)}) == 3
        assert identify(with_loras(SOURCE, {})) == identify(SOURCE)


def test_loras_for_a_quantized_reference_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="quantized"):
        with_loras(open_pipeline(folder), PAIR)


def test_a_reference_without_the_loras_of_a_model_is_spoken_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"four": configs_of(folder)}
    with caplog.at_level(logging.WARNING):
        warn_of_other_loras(with_loras(SOURCE, PAIR), models)
        assert caplog.messages == []
        warn_of_other_loras(with_loras(SOURCE, {"low_noise": "tiny-4steps"}), models)
    [message] = caplog.messages
    assert "different LoRAs in high_noise (LoRA high_noise_model.safetensors; none)" in message
    assert "--lora" in message


def test_compare_takes_the_same_loras_as_quantize_and_four_steps(folder: Path) -> None:
    loras = [text for name, file in PAIR.items() for text in ("--lora", f"{name}={file}")]
    size = ["--size", "32x32", "--frames", "5", "--samples", "1"]
    done = run("compare", "tiny", folder, *loras, *size, "--json")
    found = json.loads(done.stdout)
    assert (found["settings"]["num_steps"], found["settings"]["guidance_scale"]) == (4, 1.0)
    assert "different LoRAs" not in done.stderr
    assert all(row["num_calls"] == 2 and row["sqnr_db"]["mean"] > 5 for row in found["models"][0]["noise_prediction"])


def test_the_bundled_pair_is_refused_for_another_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tiny-4steps were distilled from tiny and fit no other model"):
        with_loras(open_pipeline("tiny-outliers"), PAIR)
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="holds no LoRA"):
        with_loras(SOURCE, {"high_noise": tmp_path / "x.safetensors"})
