"""Laws of a pipeline that is opened once: every reader gets the same facts, and nothing is read
twice.
"""

import collections
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from tempoquant.errors import ModelError, SettingsError, UnsupportedError
from tempoquant.models import weight_files
from tempoquant.models.component_files import Component
from tempoquant.models.families import FAMILIES, facts_of
from tempoquant.models.fingerprint import fingerprint, outline
from tempoquant.models.sampling_file import default_settings, settings_of
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.pipelines import I2V_A14B
from tests.quantized_wan import tiny_pipeline, write_pipeline
from tests.recorded import SOURCE, TINY

KNOWN = ", ".join(sorted(name for family in FAMILIES for name in family.pipelines))


def facts(source: SourceModel) -> dict[str, Any]:
    """Return all facts of a pipeline."""
    return {
        "names": (source.folder, source.name, source.bundled, source.hub_id, source.revision, source.pipeline_tag),
        "family": source.family.name,
        "components": {name: (each.folder, each.kind, each.forms) for name, each in source.components.items()
                       if each.has_weights},
        "denoisers": (source.denoisers, source.denoiser_components, source.other_components, source.text_components),
        "layers": [(source.blocks(name), source.linears(name), source.forms(name)) for name in source.denoiser_names],
        "quantized": [each.quantization for each in source.components.values() if each.has_weights and each.is_ours],
        "sizes": (source.geometry, source.width, source.sample_sizes("high_noise", 32, 32, 5)),
        "sampling": default_settings(source),
        "identity": (fingerprint(source), outline(source)),
    }  # fmt: skip


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_worker_gets_all_that_is_known(is_quantized: bool, tmp_path: Path) -> None:
    source = SourceModel.open(write_pipeline(tmp_path / "model") if is_quantized else "tiny")
    unasked = pickle.loads(pickle.dumps(source))
    known = facts(source)
    assert len(known["quantized"]) == (2 if is_quantized else 0)
    assert facts(unasked) == known and facts(pickle.loads(pickle.dumps(source))) == known


def test_every_header_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    forms_in = weight_files._forms_in
    monkeypatch.setattr(weight_files, "_forms_in", lambda file: read.append(file) or forms_in(file))
    facts(SourceModel.open("tiny"))
    assert collections.Counter(read) == dict.fromkeys(TINY.glob("*/*.safetensors"), 1) and len(read) == 4


def test_a_class_that_no_family_covers_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    words = rf"a FluxPipeline, which no model family covers: supported are {KNOWN}\. --family generic may run it"
    with pytest.raises(ModelError, match=words):
        SourceModel.open(tmp_path)


def test_a_pipeline_in_memory_says_the_same_as_its_folder() -> None:
    pipeline = tiny_pipeline()
    found = facts_of(pipeline)
    assert (found.family, found.denoisers) == (SOURCE.family, SOURCE.denoisers)
    assert found.denoiser("low_noise") == SOURCE.denoiser("low_noise")
    assert "WanImageToVideoPipeline" in KNOWN
    pipeline.transformer_2 = None
    with pytest.raises(ModelError, match="this WanImageToVideoPipeline has no WanTransformer3DModel as transformer_2"):
        facts_of(pipeline)
    with pytest.raises(UnsupportedError, match=rf"covers a dict: supported are {KNOWN}\."):
        facts_of({})


def test_a_denoiser_that_there_is_not_is_named_with_those_that_are() -> None:
    with pytest.raises(ModelError, match="has no denoiser 'high', only high_noise and low_noise"):
        SOURCE.forms("high")


def test_a_relative_folder_is_the_same_model_wherever_a_worker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY.parent)
    source = SourceModel.open(TINY.name)
    monkeypatch.chdir("/")
    assert source.folder == TINY and source.bundled == "" and fingerprint(source) == fingerprint(SOURCE)


def test_linears_are_numbered_by_the_blocks_they_lie_in() -> None:
    linears = SOURCE.linears("high_noise")
    assert SOURCE.blocks("high_noise") == tuple(f"blocks.{index}" for index in range(4))
    assert len(linears) == 4 * 10 and all(name.startswith(f"blocks.{each[2]}.") for name, each in linears.items())
    assert linears["blocks.2.ffn.net.2"] == (256, linears["blocks.2.ffn.net.0.proj"].out_features, 2)


def test_a_sample_is_as_large_as_its_inputs() -> None:
    width = SOURCE.first.config["text_dim"]
    assert SOURCE.sample_sizes("low_noise", 32, 32, 5) == (8, 36 * 2 * 4 * 4 + 1, 512 * width)
    assert SOURCE.sample_sizes("low_noise", 0, 0, 0) == (0, 1, 512 * width)
    assert SOURCE.geometry.num_latents(I2V_A14B) == math.prod((21, 60, 104))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 24}, "height is a multiple of 16, not 24"),
        ({"width": 40}, "width is a multiple of 16, not 40"),
        ({"num_frames": 6}, r"num_frames is 4k \+ 1 \(1, 5, …, 81\), not 6"),
    ],
)
def test_a_size_that_makes_no_whole_tokens_is_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings_of(SOURCE, changes)


@pytest.mark.parametrize("asked", ["width", "geometry"])
def test_a_config_that_does_not_say_how_large_things_are_is_named(tmp_path: Path, asked: str) -> None:
    (tmp_path / "config.json").write_text('{"patch_size": 3}')
    silent = Component(tmp_path, "diffusers", "WanTransformer3DModel")
    source = dataclasses.replace(SOURCE, components={**SOURCE.components, "transformer": silent})
    with pytest.raises(ModelError, match=r"(not|does not) say .*fetch the model again"):
        getattr(source, asked)


def test_a_component_that_is_not_there_is_named() -> None:
    source = dataclasses.replace(SOURCE, components={})
    for name in ("autoencoder", "text_encoder"):
        with pytest.raises(ModelError, match=r"names no (vae|text_encoder) in its model_index\.json"):
            getattr(source, name)
