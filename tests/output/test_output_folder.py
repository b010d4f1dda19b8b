"""Laws of the folder a run writes: complete or as it was."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

import tempoquant
from tempoquant.checkpoint import read_config, read_layer
from tempoquant.errors import OutputError
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.source import SourceModel
from tempoquant.output.output_folder import OutputFolder, RunIdentity
from tempoquant.tiny import weights_folder

IDENTITY = RunIdentity({"name": "rtn", "format": "mxfp4"}, "0" * 64, [], None, 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(weights_folder(), tmp_path / "source"))


@pytest.mark.parametrize("where", ["source", "source/inside", "."])
def test_a_result_never_overwrites_its_own_model(tmp_path: Path, source: Path, where: str) -> None:
    before = fingerprint(SourceModel.open(source))
    with pytest.raises(OutputError, match="overlap"):
        tempoquant.quantize(source, tmp_path / where, "rtn", overwrite=True)
    assert fingerprint(SourceModel.open(source)) == before


def test_links_are_to_the_files_themselves(tmp_path: Path, source: Path) -> None:
    """The files are as in the hub's cache, where a snapshot is links to blobs."""
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    file = source / "text_encoder" / "model.safetensors"
    file.rename(blob)
    file.symlink_to(Path("..") / ".." / "blobs" / "0123")
    linked = tempoquant.quantize(source, tmp_path / "linked", "rtn", link=True)
    result = linked / "text_encoder" / "model.safetensors"
    assert not result.is_symlink() and result.samefile(blob)


def test_one_changed_byte_anywhere_is_another_model(source: Path) -> None:
    before = fingerprint(SourceModel.open(source))
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert fingerprint(SourceModel.open(source)) != before


def test_a_failed_rename_brings_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    folder = OutputFolder(tmp_path / "out", IDENTITY, overwrite=True)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "result":
            raise KeyboardInterrupt
        return rename(self, target)

    with pytest.raises(KeyboardInterrupt), folder.work.owned() as work:
        (work / "result").mkdir()
        monkeypatch.setattr(Path, "rename", failing)
        folder._replace_by(work / "result")
    assert (tmp_path / "out" / "old.txt").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "out.unfinished"]


def test_a_linked_output_folder_is_replaced_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert tempoquant.quantize("tiny", tmp_path / "link", "rtn") == tmp_path / "real"
    assert (tmp_path / "real" / "model_index.json").is_file()


def test_a_result_that_lost_a_file_is_not_called_finished(tmp_path: Path) -> None:
    folder = tempoquant.quantize("tiny", tmp_path / "out", "rtn")
    os.remove(folder / "vae" / "config.json")
    with pytest.raises(OutputError, match=r"vae.config\.json is missing"):
        tempoquant.quantize("tiny", folder, "rtn")


def test_the_stored_recipe_is_resolved_and_biases_keep_their_dtype(tmp_path: Path) -> None:
    recipe = tempoquant.Recipe.load("svdquant").replace(num_prompts=1, num_steps=4, rank=0)
    folder = tempoquant.quantize("tiny", tmp_path / "out", recipe, seed=3)
    config = read_config(folder / "transformer")
    assert (config.recipe.height, config.recipe.num_frames, config.recipe.num_steps) == (64, 17, 4)
    assert config.calibration is not None and config.calibration.settings["seed"] == 3
    layer = read_layer(folder / "transformer", "blocks.0.attn1.to_q")
    with safe_open(weights_folder() / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        bias = weights.get_tensor("blocks.0.attn1.to_q.bias")
    assert layer.bias is not None and layer.bias.dtype == bias.dtype and bool((layer.bias == bias).all())


def test_what_appeared_in_the_output_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = OutputFolder._replace_by

    def meanwhile(folder: OutputFolder, result: Path) -> None:
        folder.path.mkdir()
        (folder.path / "thesis.txt").write_text("precious")
        replace(folder, result)

    with monkeypatch.context() as patched, pytest.raises(OutputError, match=r"was put into .* meanwhile"):
        patched.setattr(OutputFolder, "_replace_by", meanwhile)
        tempoquant.quantize("tiny", tmp_path / "out", "rtn")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    shutil.rmtree(tmp_path / "out")
    assert (tempoquant.quantize("tiny", tmp_path / "out", "rtn") / "model_index.json").is_file()


def test_a_model_in_the_place_of_the_unfinished_work_is_not_touched(tmp_path: Path, source: Path) -> None:
    source.rename(tmp_path / "out.unfinished")
    before = fingerprint(SourceModel.open(tmp_path / "out.unfinished"))
    with pytest.raises(OutputError, match="overlap"):
        tempoquant.quantize(tmp_path / "out.unfinished", tmp_path / "out", "rtn", overwrite=True)
    assert fingerprint(SourceModel.open(tmp_path / "out.unfinished")) == before


def test_what_a_file_manager_leaves_is_no_part_of_a_model(source: Path) -> None:
    before = fingerprint(SourceModel.open(source))
    (source / "vae" / ".DS_Store").write_text("x")
    assert fingerprint(SourceModel.open(source)) == before
