"""Every kind of damage to a component is refused, in a message that names what is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempoquant.checkpoint import check_tensors, read_config, read_layer, read_model_config, verify_hashes
from tempoquant.checkpoint.files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from tempoquant.checkpoint.tensors import KEYS
from tempoquant.errors import CheckpointError
from tests.quantized_wan import quantize_all, tiny_wan, write_component
from tests.random_layers import by_bin

MODEL = tiny_wan(num_layers=1)
MIXED = quantize_all(MODEL, "mixed")  # attn1.to_q is int4, to_k mxfp4, to_v nvfp4, to_out.0 nvfp4_m1
NAMES = {layer.format.name: name for name, layer in reversed(MIXED.items())} | {"by bin": "blocks.0.ffn.net.2"}
MIXED[NAMES["by bin"]] = by_bin(MIXED[NAMES["by bin"]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_component(tmp_path / "component", MODEL, MIXED)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_component(tmp_path / "component", MODEL, MIXED, max_shard_bytes=200_000)


# Damage to tensors: each function changes one tensor of a layer of the named format.


def of(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).view(torch.uint8)


def with_bytes(tensor: torch.Tensor, at: int, values: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone().flatten()
    changed[at : at + values.numel()] = values
    return changed.reshape(tensor.shape)


def octaves_apart(octaves: int) -> torch.Tensor:
    """Return the bytes of two scales."""
    return torch.tensor([256.0, 2.0 ** (8 - octaves)]).to(torch.float8_e4m3fn).view(torch.uint8)


U8, BF16, F32 = torch.uint8, torch.bfloat16, torch.float32
DAMAGE: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "packed is float": ("mxfp4", "packed", lambda t: t.float()),
    "packed is signed": ("mxfp4", "packed", lambda t: t.view(torch.int8)),
    "packed is transposed": ("nvfp4", "packed", lambda t: t.T.contiguous()),
    "packed has a row too many": ("int4", "packed", lambda t: torch.cat([t, t[:1]])),
    "packed has a row too few": ("int4", "packed", lambda t: t[:-1].contiguous()),
    "packed is flat": ("int4", "packed", lambda t: t.flatten()),
    "scale is float8": ("nvfp4", "scale", lambda t: t.view(torch.float8_e4m3fn)),
    "scale is bfloat16": ("int4", "scale", lambda t: t.view(BF16)),
    "scale has a group too many": ("mxfp4", "scale", lambda t: torch.cat([t, t[:, :1]], 1).contiguous()),
    "scale is empty": ("mxfp4", "scale", lambda t: t[:0]),
    "scale is E8M0's NaN": ("mxfp4", "scale", lambda t: with_bytes(t, 3, torch.tensor([255], dtype=U8))),
    "scale is E4M3's NaN": ("nvfp4", "scale", lambda t: with_bytes(t, 5, torch.tensor([0x7F], dtype=U8))),
    "scale is negative (E4M3)": ("nvfp4", "scale", lambda t: with_bytes(t, 5, torch.tensor([0x80 + 8], dtype=U8))),
    "scale is zero (E4M3)": ("nvfp4", "scale", lambda t: with_bytes(t, 5, torch.tensor([0], dtype=U8))),
    "scale has two mantissa bits": ("nvfp4_m1", "scale", lambda t: with_bytes(t, 5, torch.tensor([0x3A], dtype=U8))),
    "scale is below 2^-8 (E4M1)": ("nvfp4_m1", "scale", lambda t: with_bytes(t, 5, torch.tensor([1], dtype=U8))),
    "scales of a row are 13 octaves apart": ("nvfp4_m1", "scale", lambda t: with_bytes(t, 0, octaves_apart(13))),
    "scale is zero (BF16)": ("int4", "scale", lambda t: with_bytes(t, 4, of([0.0], BF16))),
    "scale is infinite (BF16)": ("int4", "scale", lambda t: with_bytes(t, 4, of([torch.inf], BF16))),
    "scale is NaN (BF16)": ("int4", "scale", lambda t: with_bytes(t, 4, of([torch.nan], BF16))),
    "tensor scale is NaN": ("nvfp4", "tensor_scale", lambda t: of([torch.nan], F32)),
    "tensor scale is zero": ("nvfp4", "tensor_scale", lambda t: of([0.0], F32)),
    "tensor scale is negative": ("nvfp4", "tensor_scale", lambda t: of([-1.0], F32)),
    "tensor scale is float32": ("nvfp4", "tensor_scale", lambda t: t.view(F32)),
    "tensor scale is double": ("nvfp4", "tensor_scale", lambda t: of([1.0], torch.float64)),
    "smoothing is zero": ("mxfp4", "smoothing_factor", lambda t: with_bytes(t, 2, of([0.0], BF16))),
    "smoothing is negative": ("mxfp4", "smoothing_factor", lambda t: with_bytes(t, 2, of([-1.0], BF16))),
    "smoothing is infinite": ("mxfp4", "smoothing_factor", lambda t: with_bytes(t, 2, of([torch.inf], BF16))),
    "smoothing is too long": ("mxfp4", "smoothing_factor", lambda t: torch.cat([t, t])),
    "clip ratio is zero": ("mxfp4", "clip_ratio", lambda t: with_bytes(t, 4, of([0.0], F32))),
    "clip ratio is above 2": ("mxfp4", "clip_ratio", lambda t: with_bytes(t, 4, of([2.0001], F32))),
    "clip ratio is NaN": ("mxfp4", "clip_ratio", lambda t: with_bytes(t, 4, of([torch.nan], F32))),
    "clip ratio lacks a bin": ("mxfp4", "clip_ratio", lambda t: t[:-4].contiguous()),
    "up is float16": ("mxfp4", "up", lambda t: t.to(torch.float16)),
    "up is NaN": ("mxfp4", "up", lambda t: torch.full_like(t, torch.nan)),
    "up has a rank too many": ("mxfp4", "up", lambda t: torch.cat([t, t[:, :1]], 1).contiguous()),
    "deflation is float32": ("mxfp4", "deflation", lambda t: t.float()),
    "deflation is NaN": ("mxfp4", "deflation", lambda t: torch.full_like(t, torch.nan)),
    "deflation is transposed": ("mxfp4", "deflation", lambda t: t.T.contiguous()),
    "input offset is infinite": ("mxfp4", "input_offset", lambda t: torch.full_like(t, torch.inf)),
    "input offset is float32": ("mxfp4", "input_offset", lambda t: t.float()),
    "input offset is too short": ("mxfp4", "input_offset", lambda t: t[:-1].contiguous()),
    "down is infinite": ("mxfp4", "down", lambda t: torch.full_like(t, torch.inf)),
    "down is one row": ("mxfp4", "down", lambda t: t[:1].contiguous()),
    "bias is bfloat16": ("mxfp4", "bias", lambda t: t.bfloat16()),
    "bias is too short": ("mxfp4", "bias", lambda t: t[:-1].contiguous()),
    "bias is a scalar": ("mxfp4", "bias", lambda t: t[0].clone()),
    "bias is by bin": ("mxfp4", "bias", lambda t: t.repeat(3, 1)),
    "bias of one bin": ("by bin", "bias", lambda t: t[0].clone()),
    "bias lacks a bin": ("by bin", "bias", lambda t: t[:-1].contiguous()),
    "bias of a bin is infinite": ("by bin", "bias", lambda t: torch.cat([t[:-1], torch.inf * t[-1:]])),
    "input offset lacks a bin": ("by bin", "input_offset", lambda t: t[:-1].contiguous()),
    "input offset is transposed": ("by bin", "input_offset", lambda t: t.T.contiguous()),
    "up has a bin too many": ("by bin", "up", lambda t: torch.cat([t, t[:1]])),
    "deflation of one bin": ("by bin", "deflation", lambda t: t[0].clone()),
    "down is by bin": ("by bin", "down", lambda t: t.repeat(3, 1, 1)),
}


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_refused(folder: Path, *names: str) -> None:
    """Assert that the check of everything and reading the damaged layer refuse it, in a message
    that names it.
    """
    reads: list[Callable[[], Any]] = [lambda: check_tensors(folder)]
    reads += [lambda name=name: read_layer(folder, name) for name in names]  # type: ignore[misc]
    for read in reads:
        with pytest.raises(CheckpointError) as caught:
            read()
        assert all(name in str(caught.value) for name in names) and len(str(caught.value)) < 500


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_refused(folder: Path, damage: str) -> None:
    format, key, change = DAMAGE[damage]
    name = NAMES[format]
    rewrite(folder / WEIGHTS_NAME, lambda tensors: tensors.update({f"{name}.{key}": change(tensors[f"{name}.{key}"])}))
    assert_refused(folder, name)
    with pytest.raises(CheckpointError):
        verify_hashes(folder)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_tensor_is_refused(folder: Path, key: str) -> None:
    name = NAMES["nvfp4"]
    rewrite(folder / WEIGHTS_NAME, lambda tensors: tensors.pop(f"{name}.{key}"))  # type: ignore[arg-type,return-value]
    assert_refused(folder, name)


@pytest.mark.parametrize("key", ["weight", "zero_point", "tensor_scale", "packed.again", "lora.up"])
def test_a_tensor_too_many_is_refused(folder: Path, key: str) -> None:
    name = NAMES["mxfp4"]  # which has no tensor scale
    rewrite(folder / WEIGHTS_NAME, lambda tensors: tensors.update({f"{name}.{key}": torch.ones(4, dtype=U8)}))
    assert_refused(folder, name)


def test_a_layer_that_the_config_forgot_is_refused(folder: Path) -> None:
    config = read_model_config(folder)
    del config["quantization_config"]["layers"][NAMES["mxfp4"]]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    assert_refused(folder, NAMES["mxfp4"])


def test_two_layers_exchanged_in_the_config_are_refused(folder: Path) -> None:
    config = read_model_config(folder)
    layers = config["quantization_config"]["layers"]
    a, b = NAMES["mxfp4"], NAMES["nvfp4"]
    layers[a], layers[b] = layers[b], layers[a]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        check_tensors(folder)


# Damage to files.


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    file = folder / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:keep])
    for read in (check_tensors, verify_hashes):
        with pytest.raises(CheckpointError, match="fetch it again"):
            read(folder)


def test_an_over_long_file_is_refused(folder: Path) -> None:
    with (folder / WEIGHTS_NAME).open("ab") as file:
        file.write(b"\0")
    assert_refused(folder)


def test_one_flipped_bit_of_a_code_is_seen_by_its_hash(folder: Path) -> None:
    file = folder / WEIGHTS_NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="SHA-256"):
        verify_hashes(folder)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(folder: Path) -> None:
    file = folder / WEIGHTS_NAME
    data = file.read_bytes()
    for length in (2**63, 10**8, len(data)):
        file.write_bytes(length.to_bytes(8, "little") + data[8:])
        assert_refused(folder)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    for name in ("diffusion_pytorch_model.bin", "weights.pt"):
        torch.save({}, folder / name)
        for read in (check_tensors, verify_hashes):
            with pytest.raises(CheckpointError, match="pickled"):
                read(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    assert_refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', '{"a": NaN}', "\xff\xfe", "[" * 10**5])
def test_a_config_that_is_not_json_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        read_config(folder)


def test_a_config_of_absurd_size_is_refused_unread(folder: Path) -> None:
    with (folder / CONFIG_NAME).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="larger"):
        read_config(folder)


# Where files may be.


def with_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "x.bin", "..", "", "\0"]
)
def test_an_index_that_points_elsewhere_is_refused(sharded: Path, place: str) -> None:
    with_index(sharded, lambda weight_map: weight_map.update({next(iter(weight_map)): place}))
    assert_refused(sharded)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight_map: weight_map.clear(),
        lambda weight_map: weight_map.pop(next(iter(weight_map))),
        lambda weight_map: weight_map.update(extra=next(iter(weight_map.values()))),
        lambda weight_map: weight_map.update(extra="gone.safetensors"),
        lambda weight_map: weight_map.update(extra=3),
    ],
)
def test_an_index_that_does_not_list_what_is_there_is_refused(sharded: Path, change: Any) -> None:
    with_index(sharded, change)
    assert_refused(sharded)


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    for read in (check_tensors, verify_hashes):
        with pytest.raises(CheckpointError, match="missing"):
            read(sharded)


def test_the_same_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    rewrite(second, lambda tensors: tensors.update({name: tensor}))
    assert_refused(sharded)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    os.replace(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="out of its folder"):
        check_tensors(folder)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_what_is_not_a_plain_file_is_refused(folder: Path, name: str) -> None:
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)):
        (folder / name).rename(folder / "away")
        make(folder / name)
        assert_refused(folder)
        os.rmdir(folder / name) if make is os.mkdir else (folder / name).unlink()
        (folder / "away").rename(folder / name)
