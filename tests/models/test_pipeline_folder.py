"""The refusals before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from tempoquant.errors import ModelError
from tempoquant.models.source import SourceModel
from tempoquant.tiny import weights_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the bundled pipeline that a test may damage."""
    return Path(shutil.copytree(weights_folder(), tmp_path / "model"))


def change_index(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


def test_the_bundled_model_passes() -> None:
    source = SourceModel.open("tiny")
    assert (source.folder, source.bundled, source.name) == (weights_folder(), "tiny", "tiny")
    assert set(source.components) == {
        "transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "./neither", "a/b/c"])
def test_a_missing_model_is_named_with_what_may_be_given(name: str) -> None:
    with pytest.raises(ModelError, match=r"no model folder .*tiny, tiny-outliers, a diffusers folder, or a hub id"):
        SourceModel.open(name)


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing is neither a folder here nor whole in the hub's cache"):
        SourceModel.open("nobody/nothing")


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model_index.json is missing"):
        SourceModel.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "[" * 100_000])
def test_a_malformed_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index\.json is not"):
        SourceModel.open(folder)


def test_another_pipeline_class_is_named(folder: Path) -> None:
    change_index(folder, _class_name="FluxPipeline")
    with pytest.raises(
        ModelError, match=r"is a FluxPipeline, which no model family covers: supported are .*WanPipeline"
    ):
        SourceModel.open(folder)


def test_one_expert_of_two_is_refused(folder: Path) -> None:
    change_index(folder, transformer_2=[None, None])
    with pytest.raises(ModelError, match="no WanTransformer3DModel as transformer_2"):
        SourceModel.open(folder)


def test_another_transformer_class_is_refused(folder: Path) -> None:
    change_index(folder, transformer=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(ModelError, match="no WanTransformer3DModel as transformer"):
        SourceModel.open(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/b", "..", "vae/../../x"])
def test_a_component_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    change_index(folder, **{name: ["diffusers", "AutoencoderKLWan"]})
    with pytest.raises(ModelError, match="could lie outside"):
        SourceModel.open(folder)


def test_code_from_elsewhere_is_not_loaded(folder: Path) -> None:
    change_index(folder, vae=["os", "system"])
    with pytest.raises(ModelError, match="component vae wants code from 'os'"):
        SourceModel.open(folder)


def test_a_component_that_would_have_to_be_unpickled_is_refused(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="would have to be unpickled"):
        SourceModel.open(folder)


def test_a_missing_component_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelError, match="vae is named in its pipeline's index but missing"):
        SourceModel.open(folder)


def test_a_model_without_a_boundary_is_refused(folder: Path) -> None:
    change_index(folder, boundary_ratio=None)
    with pytest.raises(ModelError, match="no boundary_ratio"):
        SourceModel.open(folder)


@pytest.mark.parametrize("ratio", [0, 1.5, -0.1, float("nan"), True])
def test_a_boundary_that_leaves_an_expert_no_timesteps_is_refused(folder: Path, ratio: float) -> None:
    change_index(folder, boundary_ratio=ratio)
    with pytest.raises(ModelError, match="lies between 0 and 1"):
        SourceModel.open(folder)


@pytest.mark.parametrize("configs_only", [True, False])
def test_weights_are_fetched_only_where_they_are_wanted(monkeypatch, folder: Path, configs_only: bool) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda hub_id, revision, allow_patterns: asked.append(allow_patterns) or folder,
    )
    assert SourceModel.open("someone/some-model", weights=not configs_only).folder == folder
    assert ["*.safetensors" in patterns for patterns in asked] == ([False] if configs_only else [False, True])
    assert all("*.json" in patterns for patterns in asked)
