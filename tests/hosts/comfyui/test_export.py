"""Files for ComfyUI hold what `quantize` wrote, tensor by tensor; everything else is refused in a
sentence.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tempoquant.checkpoint.manifest import verify_manifest
from tempoquant.errors import CheckpointError, ModelError, OutputError, TempoQuantError
from tempoquant.hosts.comfyui import export as export_module
from tempoquant.hosts.comfyui.export import export
from tempoquant.hosts.comfyui.stored import open_denoiser, open_denoisers
from tests.cli.typed import assert_refused, run
from tests.quantized_wan import write_pipeline
from tests.wan_files import wan_name

NAMES = ("high_noise", "low_noise")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return random experts with every tensor that a layer can have."""
    return write_pipeline(tmp_path_factory.mktemp("comfyui") / "quantized")


@pytest.fixture(scope="module")
def exported(quantized: Path) -> Path:
    return export(quantized, quantized.with_name("exported"))


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported / "high_noise.safetensors", tmp_path / "copy.safetensors"))


def test_a_file_holds_every_tensor_as_it_is_by_comfyuis_name(quantized: Path, exported: Path) -> None:
    for stored, name in zip(open_denoisers(quantized), NAMES, strict=True):
        tensors = load_file(exported / f"{name}.safetensors")
        own = dict(stored.tensors())
        assert {wan_name(key) for key in own} == tensors.keys() and len(own) > 50
        for key, tensor in own.items():
            found = tensors[wan_name(key)]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_a_file_is_read_as_the_folder_is(quantized: Path, exported: Path) -> None:
    for name in NAMES:
        one, other = open_denoiser(quantized, name), open_denoiser(exported / f"{name}.safetensors")
        assert one.name == other.name == name and one.header.timesteps == other.header.timesteps
        assert one.header.config == other.header.config and one.family is other.family
        assert one.header.quantization.to_dict(False) == other.header.quantization.to_dict(False)
        mine, its = dict(one.tensors()), dict(other.tensors())
        assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
        assert torch.equal(other.read("scale_shift_table"), mine["scale_shift_table"])


def test_a_component_knows_its_pipeline_and_alone_it_loads_too(quantized: Path, tmp_path: Path) -> None:
    assert open_denoiser(quantized / "transformer_2").header.timesteps == (0.0, 900.0)
    alone = shutil.copytree(quantized / "transformer_2", tmp_path / "alone")
    assert open_denoiser(alone).header.timesteps == (0.0, 1000.0) and open_denoiser(alone).name == "low_noise"


def test_a_link_to_a_file_or_folder_is_followed(quantized: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").symlink_to(exported / "low_noise.safetensors")
    (tmp_path / "folder").symlink_to(quantized)
    assert open_denoiser(tmp_path / "file.safetensors").name == "low_noise"
    assert [each.name for each in open_denoisers(tmp_path / "folder")] == [*NAMES]


def test_an_export_verifies_and_is_left_as_it_is_the_second_time(quantized: Path, exported: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in exported.iterdir()}
    assert export(quantized, exported) == exported
    assert {file: file.stat().st_mtime_ns for file in exported.iterdir()} == before
    assert verify_manifest(exported) == ["README.md", "high_noise.safetensors", "low_noise.safetensors"]
    assert "wan" in (exported / "README.md").read_text().lower()


def test_what_was_finished_before_an_interruption_is_kept(
    quantized: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, written = export_module.OneFileWriter, []

    def interrupted(file: Path, *args: Any) -> Any:
        if len(written) == 1:
            raise KeyboardInterrupt
        return noted(file, *args)

    def noted(file: Path, *args: Any) -> Any:
        written.append(file.name)
        return writer(file, *args)

    monkeypatch.setattr(export_module, "OneFileWriter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export_module, "OneFileWriter", noted)
    export(quantized, tmp_path / "out")
    assert written == ["high_noise.safetensors.partial", "low_noise.safetensors.partial"]
    for file in exported.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return the file with another record in its metadata."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    record = json.loads(metadata["tempoquant"])
    change(record)
    save_file(load_file(file), file, {**metadata, "tempoquant": json.dumps(record)})
    return file


def newer_quantization(record: dict[str, Any]) -> None:
    record["config"]["quantization_config"]["format_version"] = 99


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    r"export of version 2, newer than the 1 this TempoQuant reads: upgrade": lambda record: record.update(version=2),
    r"format_version is 99, newer than": newer_quantization,
    r"timesteps ascend in 0 … 1000, not \[900, 900\]": lambda record: record.update(timesteps=[900, 900]),
    r"unknown key 'more'": lambda record: record.update(more=1),
    r"version is a whole number above 0, not 'one'": lambda record: record.update(version="one"),
    r"config holds a quantization_config": lambda record: record.update(config={}),
    r"is a LTXVideoTransformer3DModel, which TempoQuant does not run in ComfyUI": lambda record: record[
        "config"
    ].update(_class_name="LTXVideoTransformer3DModel"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_header_that_says_something_else_is_refused(copy: Path, message: str) -> None:
    with pytest.raises(TempoQuantError, match=message):
        open_denoiser(rewritten(copy, CHANGES[message]))


def test_a_file_without_or_with_other_tensors_is_refused(copy: Path) -> None:
    with safe_open(copy, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(copy)
    some = next(key for key in tensors if key.endswith(".packed"))
    for changed in (
        {key: tensor for key, tensor in tensors.items() if key != some},
        {**tensors, some: tensors[some][:1].clone()},
        {**tensors, "blocks.0.somebody.weight": torch.zeros(1)},
    ):
        save_file(changed, copy, metadata)
        with pytest.raises(CheckpointError, match="damaged or newer"):
            open_denoiser(copy)


def test_files_and_folders_of_others_are_refused_with_what_to_do(quantized: Path, tmp_path: Path) -> None:
    save_file({"blocks.0.ffn.0.weight": torch.zeros(2, 2)}, tmp_path / "stock.safetensors")
    (tmp_path / "empty").mkdir()
    shutil.copytree(quantized, tmp_path / "dense")
    config = tmp_path / "dense/transformer/config.json"
    record = json.loads(config.read_text())
    del record["quantization_config"]
    config.write_text(json.dumps(record))
    for path, message in (
        ("stock.safetensors", "load it with ComfyUI's own Load Diffusion Model"),
        ("empty", "holds neither model_index.json nor config.json"),
        ("nowhere", "there is no folder or file"),
        ("dense", "is not quantized by TempoQuant"),
    ):
        with pytest.raises(TempoQuantError, match=message):
            open_denoisers(tmp_path / path)


def test_one_of_several_must_be_named_and_be_there(quantized: Path, exported: Path) -> None:
    with pytest.raises(ModelError, match="holds high_noise and low_noise: name the one to load"):
        open_denoiser(quantized)
    with pytest.raises(ModelError, match="holds no low_noise, only high_noise"):
        open_denoiser(exported / "high_noise.safetensors", "low_noise")


def test_experts_that_lie_in_each_others_place_are_refused(quantized: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized, tmp_path / "swapped")
    (folder / "transformer").rename(folder / "x")
    (folder / "transformer_2").rename(folder / "transformer")
    (folder / "x").rename(folder / "transformer_2")
    with pytest.raises(CheckpointError, match="holds the low_noise denoiser, but belongs to high_noise"):
        open_denoisers(folder)


def test_the_command_writes_them_and_refuses_to_link(quantized: Path, exported: Path, tmp_path: Path) -> None:
    done = run("export", quantized, "--to", "comfyui", "-o", tmp_path / "out", "--json")
    record = json.loads(done.stdout)
    assert record["target"] == "comfyui" and record["clip_ratios_carried"] is True and not record["existed"]
    assert record["files"] == {file.name: file.stat().st_size for file in sorted(exported.glob("*.safetensors"))}
    again = run("export", quantized, "--to", "comfyui", "-o", tmp_path / "out")
    assert "was already finished" in " ".join(again.stdout.split())
    assert_refused(run("export", quantized, "--to", "comfyui", "-o", tmp_path / "x", "--link"), 1, "leave it out")
    with pytest.raises(OutputError, match="overlap"):
        export(quantized, quantized / "inside")
