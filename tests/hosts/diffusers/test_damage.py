"""A damaged component is refused by diffusers' from_pretrained too, with our error wherever our
code is reached.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempoquant.checkpoint import FORMAT_VERSION
from tempoquant.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME
from tempoquant.errors import CheckpointError, UnsupportedError
from tempoquant.hosts.diffusers.loader import register
from tests.quantized_wan import load, quantize_all, tiny_wan, write_component

register()
MODEL = tiny_wan(num_layers=1)
LAYERS = quantize_all(MODEL, "mixed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_component(tmp_path / "component", MODEL, LAYERS)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    change(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_NAME).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


NAME = "blocks.0.attn1.to_k"  # mxfp4
WEIGHT_DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a tensor of a layer is missing": lambda t: t.pop(f"{NAME}.up"),
    "a tensor of the rest is missing": lambda t: t.pop("proj_out.bias"),
    "a tensor of a layer is too many": lambda t: t.update({f"{NAME}.weight": torch.zeros(2)}),
    "a tensor of the rest is too many": lambda t: t.update({"blocks.1.attn1.to_q.weight": torch.zeros(2)}),
    "a layer's tensor is of another dtype": lambda t: t.update({f"{NAME}.up": t[f"{NAME}.up"].float()}),
    "a layer's tensor is of another shape": lambda t: t.update({f"{NAME}.packed": t[f"{NAME}.packed"].flatten()}),
    "a tensor of the rest is of another shape": lambda t: t.update({"proj_out.bias": torch.zeros(3)}),
    "a scale is NaN": lambda t: t[f"{NAME}.scale"].fill_(255),
    "a deflation is NaN": lambda t: t[f"{NAME}.deflation"].fill_(torch.nan),
    "an input offset is infinite": lambda t: t[f"{NAME}.input_offset"].fill_(torch.inf),
    "a deflation is missing": lambda t: t.pop(f"{NAME}.deflation"),
    "a float32 bias was cast": lambda t: t.update({f"{NAME}.bias": t[f"{NAME}.bias"].bfloat16()}),
    "a clip ratio is zero": lambda t: t[f"{NAME}.clip_ratio"].zero_(),
}


@pytest.mark.parametrize("damage", WEIGHT_DAMAGE)
def test_damaged_weights_are_refused(folder: Path, damage: str) -> None:
    edit_weights(folder, WEIGHT_DAMAGE[damage])
    with pytest.raises(CheckpointError):
        load(folder)


CONFIG_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "newer version": lambda c: c["quantization_config"].update(format_version=FORMAT_VERSION + 1),
    "unknown key": lambda c: c["quantization_config"].update(colour="red"),
    "a layer less": lambda c: c["quantization_config"]["layers"].pop(NAME),
    "another rank": lambda c: c["quantization_config"]["layers"][NAME].update(rank=5),
    "another format": lambda c: c["quantization_config"]["layers"][NAME].update(format="nvfp4"),
    "not deflated": lambda c: c["quantization_config"]["layers"][NAME].update(deflated=False),
    "not centred": lambda c: c["quantization_config"]["layers"][NAME].update(centred=False),
    "an older version": lambda c: c["quantization_config"].update(format_version=1),
    "another number of bins": lambda c: c["quantization_config"].update(timestep_edges=[900.0]),
    "a layer that the model lacks": lambda c: c.update(num_layers=0),
    "a block that the weights lack": lambda c: c.update(num_layers=2),
    "another width": lambda c: c.update(num_attention_heads=1),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_a_damaged_config_is_refused(folder: Path, damage: str) -> None:
    edit_config(folder, CONFIG_DAMAGE[damage])
    with pytest.raises(CheckpointError):
        load(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises((CheckpointError, OSError)):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_NAME), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="never unpickles"):
        load(folder)


def test_pickled_weights_are_not_written(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="safetensors only"):
        load(folder).save_pretrained(tmp_path / "again", safe_serialization=False)
    assert not list((tmp_path / "again").glob("*.bin"))


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    os.replace(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="out of its folder"):
        load(folder)
