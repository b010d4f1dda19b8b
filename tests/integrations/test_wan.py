"""What is known and checked about the experts of a Wan pipeline."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempoquant.errors import ModelError, RecipeError
from tempoquant.integrations.wan import WanExpert, check_recipe_fits, load_expert, load_pipeline, stored_tensors
from tempoquant.recipe import LayerRule, Recipe
from tempoquant.timesteps import Expert
from tempoquant.tiny import weights_folder

PAPER = Recipe.load("paper")


@pytest.mark.parametrize("name", ["paper", "rtn", "svdquant"])
def test_every_built_in_recipe_fits_the_bundled_model(name: str) -> None:
    check_recipe_fits(weights_folder(), Recipe.load(name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 257}, "rank 257 exceeds the smaller side"),
        ({"layers": (LayerRule("transformer.blocks.0.*", "16bit"),)}, "matches no layer"),
        ({"layers": (LayerRule("*", "16bit"),)}, "nothing to quantize"),
        ({"keep_16bit_blocks": (4, 0)}, "nothing to quantize"),
        ({"keep_16bit_blocks": (99, 99)}, "nothing to quantize"),
    ],
)
def test_a_recipe_that_cannot_fit_is_refused_before_any_work(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_recipe_fits(weights_folder(), PAPER.replace(**changes))


def test_each_expert_has_ten_linears_a_block() -> None:
    model = WanExpert(load_expert(weights_folder(), Expert.LOW_NOISE, "cpu", torch.float32), Expert.LOW_NOISE)
    assert [len(model.linears(index)) for index in range(model.num_blocks)] == [10] * model.num_blocks
    assert {"blocks.1.attn1.to_out.0", "blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2"} <= set(model.linears(1))


def test_stored_tensors_keep_their_dtype() -> None:
    found = dict(stored_tensors(weights_folder(), Expert.HIGH_NOISE, lambda name: name.startswith("blocks.0.")))
    assert found["blocks.0.attn1.to_q.bias"].dtype == torch.bfloat16
    assert found["blocks.0.scale_shift_table"].dtype == torch.float32
    assert not any(name.startswith("blocks.1.") for name in found)


@pytest.mark.parametrize("component", ["text_encoder", "vae", "transformer"])
def test_a_component_that_lacks_a_weight_is_refused_and_not_made_up(tmp_path: Path, component: str) -> None:
    folder = Path(shutil.copytree(weights_folder(), tmp_path / "model"))
    [file] = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(name for name in tensors if name.endswith(".weight"))[0]
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weight"):
        load_pipeline(folder, "cpu")


def test_a_truncated_text_encoder_is_one_sentence(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(weights_folder(), tmp_path / "model"))
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="does not load"):
        load_pipeline(folder, "cpu")
