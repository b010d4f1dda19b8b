"""A component that does not load as a whole is refused in one sentence, and no weight is made
up.
"""

import dataclasses
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tempoquant.errors import ModelError
from tempoquant.hosts.diffusers.pipeline import load_pipeline, pipeline_class
from tempoquant.models.source import SourceModel
from tests.recorded import SOURCE, TINY


@pytest.mark.parametrize("component", ["text_encoder", "vae", "transformer"])
def test_a_component_that_lacks_a_weight_is_refused_and_not_made_up(tmp_path: Path, component: str) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    [file] = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(name for name in tensors if name.endswith(".weight"))[0]
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weight"):
        SourceModel.open(folder)
    unchecked = SourceModel.open(folder, weights=False)
    with pytest.raises(ModelError, match="lacks 1 weight"):
        load_pipeline(unchecked, "cpu")


def test_a_text_encoder_that_was_cut_off_since_is_one_sentence(tmp_path: Path) -> None:
    source = SourceModel.open(shutil.copytree(TINY, tmp_path / "model"))
    file = source.folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="does not load as a WanImageToVideoPipeline"):
        load_pipeline(source, "cpu")
    with pytest.raises(ModelError, match=r"text_encoder.*is not a whole safetensors file"):
        SourceModel.open(source.folder)


def test_a_pipeline_that_the_installed_diffusers_does_not_know_is_named() -> None:
    index = SOURCE.index._replace(values={**SOURCE.index.values, "_class_name": "WanFromTheFuturePipeline"})
    with pytest.raises(ModelError, match="is a WanFromTheFuturePipeline, which the diffusers installed here"):
        pipeline_class(dataclasses.replace(SOURCE, index=index))
