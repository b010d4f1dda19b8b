"""Laws of commits: a writer that is gone leaves what it committed, and nothing else."""

import shutil
from pathlib import Path

import pytest
import torch

from tempoquant.checkpoint.journal import Journal
from tempoquant.checkpoint.writer import ComponentWriter
from tempoquant.errors import OutputError
from tests.quantized_wan import BINS, RECIPE, model_config, quantize_all, tiny_wan

MODEL = tiny_wan()
LAYERS = quantize_all(MODEL)


def writer(tmp_path: Path) -> ComponentWriter:
    journal = Journal(tmp_path / "journal")
    return ComponentWriter(
        tmp_path / "component", denoiser="high_noise", bins=BINS, recipe=RECIPE, journal=journal
    )  # fmt: skip


def write_block(into: ComponentWriter, index: int) -> None:
    for name, layer in LAYERS.items():
        if name.startswith(f"blocks.{index}."):
            into.add_layer(name, layer)
    for name, tensor in MODEL.state_dict().items():
        if name.startswith(f"blocks.{index}.") and name.rpartition(".")[0] not in LAYERS:
            into.add_tensor(name, tensor)
    into.commit((f"block {index}",))


def finish(into: ComponentWriter) -> None:
    for name, tensor in MODEL.state_dict().items():
        if not name.startswith("blocks."):
            into.add_tensor(name, tensor)
    into.finish(model_config(MODEL), notes=("all",))


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "whole").mkdir()
    with writer(tmp_path / "whole") as into:
        write_block(into, 0)
        write_block(into, 1)
        finish(into)
    return all_bytes(tmp_path / "whole" / "component")


def test_a_component_written_in_two_lives_has_the_same_bytes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with writer(tmp_path) as into:
        write_block(into, 0)
        into.add_layer("blocks.1.attn1.to_q", LAYERS["blocks.1.attn1.to_q"])  # lost: never committed
    with writer(tmp_path) as into:
        assert into.num_commits == 1
        assert set(into.layers) == {name for name in LAYERS if name.startswith("blocks.0.")}
        write_block(into, 1)
        finish(into)
    assert all_bytes(tmp_path / "component") == whole
    assert not (tmp_path / "journal").exists()


def test_shards_of_no_commit_are_removed(tmp_path: Path) -> None:
    with writer(tmp_path) as into:
        write_block(into, 0)
    (tmp_path / "journal" / "shards" / "1.safetensors").write_bytes(b"half a shard")
    (tmp_path / "journal" / "shards" / "config.json").write_text("{}")
    with writer(tmp_path):
        assert [file.name for file in (tmp_path / "journal" / "shards").iterdir()] == ["0.safetensors"]


def test_a_writer_killed_while_naming_its_shards_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with writer(tmp_path) as into:
        write_block(into, 0)
        write_block(into, 1)
    shards = tmp_path / "journal" / "shards"
    (shards / "0.safetensors").rename(shards / "diffusion_pytorch_model-00001-of-00003.safetensors")
    with writer(tmp_path) as into:
        assert into.num_commits == 2
        finish(into)
    assert all_bytes(tmp_path / "component") == whole


@pytest.mark.parametrize("damage", ["shard", "missing", "commit"])
def test_damaged_work_is_refused_and_the_remedy_named(tmp_path: Path, damage: str) -> None:
    with writer(tmp_path) as into:
        write_block(into, 0)
    shard = tmp_path / "journal" / "shards" / "0.safetensors"
    if damage == "shard":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(bytes(content))
    elif damage == "missing":
        shard.unlink()
    else:
        (tmp_path / "journal" / "0000.json").write_text('{"shards": 3}')
    with pytest.raises(OutputError, match=rf"remove {tmp_path / 'journal'}, and this denoiser starts over"):
        writer(tmp_path)
    shutil.rmtree(tmp_path / "journal")
    assert writer(tmp_path).num_commits == 0


def test_commits_beyond_a_gap_are_removed(tmp_path: Path) -> None:
    with writer(tmp_path) as into:
        write_block(into, 0)
        write_block(into, 1)
    (tmp_path / "journal" / "0000.json").unlink()
    with writer(tmp_path) as into:
        assert into.num_commits == 0 and not into.layers
        assert not list((tmp_path / "journal").rglob("*.json")) and not list((tmp_path / "journal").rglob("*.safet*"))


def test_a_layer_committed_earlier_is_not_added_again(tmp_path: Path) -> None:
    with writer(tmp_path) as into:
        write_block(into, 0)
    with writer(tmp_path) as into, pytest.raises(Exception, match="added twice"):
        write_block(into, 0)


def test_a_writer_without_a_journal_cannot_commit(tmp_path: Path) -> None:
    with (
        ComponentWriter(tmp_path / "c", denoiser="high_noise", bins=BINS, recipe=RECIPE) as into,
        pytest.raises(ValueError, match="cannot commit"),
    ):
        into.add_tensor("x", torch.zeros(1))
        into.commit()
