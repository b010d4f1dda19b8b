"""Laws of the reader: what was written is what is read, bit for bit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tempoquant.checkpoint import (
    check_tensors,
    iter_layers,
    read_config,
    read_layer,
    read_model_config,
    read_tensor,
    verify_hashes,
)
from tempoquant.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from tempoquant.checkpoint.tensors import entry_of, to_stored
from tempoquant.errors import CheckpointError
from tempoquant.formats import FORMATS
from tempoquant.layer import QuantizedLayer
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import BINS, CALIBRATION, RECIPE, quantize_all, tiny_wan, write_component
from tests.random_layers import by_bin

MODEL = tiny_wan(num_layers=1)
MIXED = quantize_all(MODEL, "mixed")  # attn1.to_q is int4, to_k mxfp4, to_v nvfp4, to_out.0 nvfp4_m1
MIXED["blocks.0.attn2.to_q"] = by_bin(MIXED["blocks.0.attn2.to_q"])
NAMES = {layer.format.name: name for name, layer in reversed(MIXED.items())}


def same(a: QuantizedLayer, b: QuantizedLayer) -> bool:
    """Return whether tensors are equal to the last bit and in every dtype."""
    pairs = list(zip(to_stored(a, "a").values(), to_stored(b, "b").values(), strict=True))
    tensors_agree = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
    return tensors_agree and (entry_of(a), a.bins) == (entry_of(b), b.bins)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_component(tmp_path / "component", MODEL, MIXED)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_component(tmp_path / "component", MODEL, MIXED, max_shard_bytes=200_000)


@pytest.mark.parametrize("format", [*FORMATS, "mixed"])
@pytest.mark.parametrize(
    ("has", "bins"),
    [
        ({}, BINS),
        ({"deflated": False}, BINS),
        ({"centred": False}, BINS),
        ({"rank": 0, "smoothed": False}, TimestepBins()),
        ({"rank": 0, "smoothed": False, "centred": False}, TimestepBins()),
        ({"rank": 128}, BINS),
        ({"centred_by_bin": True}, BINS),
        ({"centred_by_bin": True, "deflated_by_bin": True}, BINS),
        ({"centred": False, "deflated_by_bin": True}, TimestepBins()),
    ],
    ids=str,
)
def test_what_was_written_is_what_is_read(tmp_path: Path, format: str, has: dict[str, Any], bins: TimestepBins) -> None:
    layers = quantize_all(MODEL, format, bins=bins, **has)
    written = write_component(tmp_path / "component", MODEL, layers, bins=bins)
    read = dict(iter_layers(written))
    assert read.keys() == layers.keys()
    assert all(same(read[name], layer) for name, layer in layers.items())


def test_a_component_read_and_written_again_is_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    again = write_component(tmp_path / "again", MODEL, dict(iter_layers(folder)))
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_component_of_version_3_is_read_without_tensors_by_bin(tmp_path: Path) -> None:
    layers = quantize_all(MODEL, "mixed")
    old = write_component(tmp_path / "component", MODEL, layers)
    config = read_model_config(old)
    config["quantization_config"]["format_version"] = 3
    for entry in config["quantization_config"]["layers"].values():
        del entry["centred_by_bin"], entry["deflated_by_bin"], entry["weights_alone"]
    (old / CONFIG_NAME).write_text(json.dumps(config))
    check_tensors(old)
    assert all(same(layer, layers[name]) for name, layer in iter_layers(old))


def test_one_layer_is_read_from_shards(sharded: Path) -> None:
    for name, layer in MIXED.items():
        assert same(read_layer(sharded, name), layer)


def test_what_is_read_owns_its_memory(folder: Path) -> None:
    layer = read_layer(folder, NAMES["mxfp4"])
    (folder / WEIGHTS_NAME).write_bytes(b"")
    assert same(layer, MIXED[NAMES["mxfp4"]])
    assert layer.clip_ratio.data_ptr() % layer.clip_ratio.element_size() == 0


def test_the_16bit_rest_is_read_as_stored(folder: Path) -> None:
    for name in ("proj_out.weight", "scale_shift_table"):
        stored, source = read_tensor(folder, name), MODEL.state_dict()[name]
        assert stored.dtype == source.dtype and torch.equal(stored, source)


def test_the_config_says_what_was_written(folder: Path) -> None:
    config = read_config(folder)
    assert (config.recipe, config.calibration, config.bins) == (RECIPE, CALIBRATION, BINS)
    assert config.notes == ("blocks.0.ffn.net.2: Hessian in float64",)
    assert read_model_config(folder)["num_layers"] == 1


def test_an_unknown_name_is_refused(folder: Path) -> None:
    for read in (read_layer, read_tensor):
        with pytest.raises(CheckpointError, match=r"blocks\.9"):
            read(folder, "blocks.9.attn1.to_q")


def test_an_unquantized_component_says_so(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not quantized"):
        read_config(tmp_path)


def test_a_missing_folder_is_a_checkpoint_error(tmp_path: Path) -> None:
    for read in (read_config, check_tensors, verify_hashes):
        with pytest.raises(CheckpointError, match="there is no"):
            read(tmp_path / "nowhere")


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path, folder: Path) -> None:
    repo = tmp_path / "models--someone--wan"
    snapshot = repo / "snapshots" / "abc" / "transformer"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, name in enumerate((CONFIG_NAME, WEIGHTS_NAME)):
        os.replace(folder / name, repo / "blobs" / str(i))
        (snapshot / name).symlink_to(Path("../../../blobs") / str(i))
    check_tensors(snapshot)
    verify_hashes(snapshot)
