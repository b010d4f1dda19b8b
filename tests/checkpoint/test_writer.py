"""Laws of the writer: same inputs, same bytes; an interrupted or failed write leaves nothing."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tempoquant.checkpoint import (
    Calibration,
    ComponentWriter,
    check_tensors,
    read_config,
    read_layer,
    read_tensor,
    verify_hashes,
)
from tempoquant.checkpoint.files import INDEX_NAME, WEIGHTS_NAME
from tempoquant.errors import CheckpointError, OutputError
from tempoquant.layer import LowRankBranch
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import BINS, RECIPE, quantize_all, tiny_wan, write_component
from tests.random_layers import random_layer

LAYER = random_layer(torch.nn.Linear(128, 64))


def writer(folder: Path, **kwargs: Any) -> ComponentWriter:
    return ComponentWriter(folder, denoiser="high_noise", bins=BINS, recipe=RECIPE, **kwargs)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("max_shard_bytes", [2**30, 100_000])
def test_the_same_inputs_give_the_same_bytes_wherever_they_go(tmp_path: Path, max_shard_bytes: int) -> None:
    for place in ("here", "some/where/else"):
        model = tiny_wan(num_layers=1)
        write_component(tmp_path / place, model, quantize_all(model, "mixed"), max_shard_bytes=max_shard_bytes)
    assert contents(tmp_path / "here") == contents(tmp_path / "some/where/else")


def test_config_holds_the_hash_of_every_weight_file(tmp_path: Path) -> None:
    model = tiny_wan(num_layers=1)
    folder = write_component(tmp_path / "c", model, quantize_all(model), max_shard_bytes=100_000)
    hashes = json.loads((folder / "config.json").read_text())["quantization_config"]["weight_sha256"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    assert hashes == found and len(found) > 1 and verify_hashes(folder) == sorted(found)


def test_one_shard_has_no_index_and_several_have_one(tmp_path: Path) -> None:
    model = tiny_wan(num_layers=1)
    layers = quantize_all(model)
    one = write_component(tmp_path / "one", model, layers)
    several = write_component(tmp_path / "several", model, layers, max_shard_bytes=200_000)
    assert sorted(contents(one)) == ["config.json", WEIGHTS_NAME]
    index = json.loads((several / INDEX_NAME).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert sorted(contents(several)) == sorted(["config.json", INDEX_NAME, *shards])
    assert shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    for folder in (one, several):
        check_tensors(folder)


def test_a_shard_is_no_larger_than_asked_but_for_a_larger_tensor(tmp_path: Path) -> None:
    limit = 200_000
    model = tiny_wan(num_layers=1)
    folder = write_component(tmp_path / "c", model, quantize_all(model), max_shard_bytes=limit)
    largest = max(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    for shard in folder.glob("*.safetensors"):
        assert shard.stat().st_size <= max(limit, largest) + 20_000  # and its header


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with writer(tmp_path / "c") as unfinished:
        unfinished.add_layer("a", LAYER)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "c", max_shard_bytes=1) as interrupted:
        interrupted.add_layer("a", LAYER)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_nothing_that_loads(tmp_path: Path) -> None:
    killed = writer(
        tmp_path / "c", max_shard_bytes=1
    )  # never finished nor aborted: what is on disk is what a kill leaves
    killed.add_layer("a", LAYER)
    killed.add_tensor("b", torch.zeros(1))
    assert not (tmp_path / "c").exists()
    (partial,) = tmp_path.iterdir()
    with pytest.raises(CheckpointError):
        read_config(partial)


def test_a_file_that_cannot_grow_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # there are no file size limits on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match="free some space"), writer(tmp_path / "c") as full:
            full.add_layer("a", LAYER)
            full.finish({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace_onto_a_full_disk(source: Any, target: Any) -> None:
        Path("/dev/full").write_bytes(b"x")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_onto_a_full_disk)
    with pytest.raises(OutputError, match="No space left"), writer(tmp_path / "c") as full:
        full.add_layer("a", LAYER)
        full.finish({})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        writer(tmp_path)
    assert contents(tmp_path) == {"kept": b"mine"}


def test_a_file_where_the_folder_should_go_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError):
            writer(target)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with writer(tmp_path / "c") as empty:
        empty.add_layer("a", LAYER)
        empty.finish({"_class_name": "Thing"})
    check_tensors(tmp_path / "c")


def test_later_changes_to_a_tensor_do_not_reach_the_file(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    with writer(tmp_path / "c") as copying:
        copying.add_tensor("a", tensor)
        tensor.zero_()
        copying.finish({})
    assert read_tensor(tmp_path / "c", "a").tolist() == [1, 1, 1]


def test_twice_the_same_name_is_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "c", max_shard_bytes=1) as twice:
        twice.add_layer("a", LAYER)
        twice.add_tensor("b", torch.zeros(1))
        for add in (lambda: twice.add_layer("a", LAYER), lambda: twice.add_tensor("b", torch.zeros(1))):
            with pytest.raises(CheckpointError, match="twice"):
                add()


def deflated_by(deflation: torch.Tensor) -> LowRankBranch:
    return LowRankBranch(torch.ones(64, 4).bfloat16(), torch.ones(4, 128).bfloat16(), deflation)


def changed(**changes: Any) -> Any:
    return dataclasses.replace(LAYER, **changes)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: changed(clip_ratio=torch.tensor([1.0, 2.5, 1.0])),
        lambda: changed(clip_ratio=torch.ones(3, dtype=torch.float64)),
        lambda: changed(smoothing_factor=torch.zeros(128, dtype=torch.bfloat16)),
        lambda: changed(smoothing_factor=torch.ones(128)),
        lambda: changed(smoothing_factor=torch.ones(64, dtype=torch.bfloat16)),
        lambda: changed(branch=LowRankBranch(torch.ones(64, 4), torch.ones(4, 128))),
        lambda: changed(branch=LowRankBranch(torch.full((64, 4), torch.nan).bfloat16(), torch.ones(4, 128).bfloat16())),
        lambda: changed(branch=deflated_by(torch.ones(128, 4))),
        lambda: changed(branch=deflated_by(torch.full((128, 4), torch.nan).bfloat16())),
        lambda: changed(input_offset=torch.ones(128)),
        lambda: changed(input_offset=torch.ones(64).bfloat16()),
        lambda: changed(input_offset=torch.full((128,), torch.inf).bfloat16()),
        lambda: changed(input_offset=torch.ones(3, 64).bfloat16(), bias=torch.ones(3, 64)),
        lambda: changed(input_offset=torch.ones(3, 128).bfloat16(), bias=torch.ones(3, 128)),
        lambda: changed(bias=torch.full((64,), torch.inf)),
        lambda: changed(bias=torch.ones(64, dtype=torch.float64)),
        lambda: changed(scale=torch.full_like(LAYER.scale, 255)),
        lambda: changed(packed=LAYER.packed[:-1]),
    ],
)
def test_a_layer_that_could_not_be_read_back_is_not_written(tmp_path: Path, layer: Any) -> None:
    with writer(tmp_path / "c") as strict, pytest.raises(CheckpointError, match=r"^a cannot be stored: .*\.$"):
        strict.add_layer("a", layer())


def test_a_layer_with_other_bins_than_its_component_is_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "c") as strict, pytest.raises(CheckpointError, match="bins"):
        strict.add_layer("a", changed(clip_ratio=torch.ones(1), bins=TimestepBins()))


def test_a_config_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    for kwargs in ({"calibration": Calibration((), {"x": "y" * (17 * 2**20)})}, {"notes": ("n" * 5000,)}):
        with pytest.raises(CheckpointError), writer(tmp_path / "c") as strict:
            strict.add_layer("a", LAYER)
            strict.finish({}, **kwargs)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_empty_branch_is_stored_as_none(tmp_path: Path) -> None:
    empty = LowRankBranch(torch.ones(64, 0).bfloat16(), torch.ones(0, 128).bfloat16(), torch.ones(128, 0).bfloat16())
    with writer(tmp_path / "c") as storing:
        storing.add_layer("a", changed(branch=empty))
        storing.finish({})
    assert read_layer(tmp_path / "c", "a").branch is None
