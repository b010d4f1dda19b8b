"""What is known and checked about the experts of a Wan pipeline."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempoquant.calibrate.capture import watching_calls, watching_inputs
from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.errors import ModelError, RecipeError
from tempoquant.integrations.expert_weights import ExpertWeights
from tempoquant.integrations.wan import WanExpert, check_recipe_fits, load_pipeline
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
        ({"layers": (LayerRule("low_noise.*.ffn.*", rank=258),)}, "rank 258 exceeds the smaller side"),
        ({"layers": (LayerRule("transformer.blocks.0.*", "16bit"),)}, "matches no layer"),
        ({"layers": (LayerRule("*", "16bit"),)}, "nothing to quantize"),
        ({"keep_16bit_blocks": (4, 0)}, "nothing to quantize"),
        ({"keep_16bit_blocks": (99, 99)}, "nothing to quantize"),
    ],
)
def test_a_recipe_that_cannot_fit_is_refused_before_any_work(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_recipe_fits(weights_folder(), PAPER.replace(**changes))


def test_each_expert_has_ten_linears_a_block_and_those_of_one_input_stand_together() -> None:
    model = WanExpert(ExpertWeights(weights_folder(), Expert.LOW_NOISE, torch.float32, "cpu"))
    for index in range(model.num_blocks):
        assert model.shared_inputs(index) == [
            ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn1.to_out.0",), ("attn2.to_q",),
            ("attn2.to_k", "attn2.to_v"), ("attn2.to_out.0",), ("ffn.net.0.proj",), ("ffn.net.2",),
        ]  # fmt: skip
    assert model.name_of(3, "attn1.to_out.0") == "blocks.3.attn1.to_out.0"


def test_linears_said_to_share_an_input_do() -> None:
    model = WanExpert(ExpertWeights(weights_folder(), Expert.HIGH_NOISE, torch.float32, "cpu"))
    [(_, (args, kwargs))] = model.first_block_calls([random_sample()])
    with model.block(0) as block:
        inputs: dict[str, torch.Tensor] = {}
        linears = {name: block.get_submodule(name) for group in model.shared_inputs(0) for name in group}
        with watching_inputs(linears, lambda name, x: inputs.setdefault(name, x.clone())), torch.no_grad():
            block(*args, **kwargs)
    groups = model.shared_inputs(0)
    for group in groups:
        assert all(torch.equal(inputs[name], inputs[group[0]]) for name in group)
    first = [inputs[group[0]] for group in groups]
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def test_calls_share_the_memory_of_equal_arguments() -> None:
    model = WanExpert(ExpertWeights(weights_folder(), Expert.HIGH_NOISE, torch.float32, "cpu"))
    calls = [args for _, (args, _) in model.first_block_calls([random_sample(), random_sample()])]
    assert calls[0][0] is not calls[1][0]  # hidden states
    assert calls[0][1] is calls[1][1]  # text
    assert calls[0][3][0] is calls[1][3][0]  # positions


def test_what_comes_after_the_last_block_ends_in_the_noise_prediction_of_the_whole_model() -> None:
    model = WanExpert(ExpertWeights(weights_folder(), Expert.HIGH_NOISE, torch.float32, "cpu"))
    whole = load_pipeline(weights_folder(), "cpu").transformer
    seen: list[torch.Tensor] = []
    with torch.no_grad(), watching_calls(whole.blocks[-1], lambda _, output: seen.append(output)):
        noise_prediction = whole(**random_sample().inputs, return_dict=False)[0]
    [finish] = model.after_last_block([random_sample()])
    with pytest.raises(RuntimeError):  # the weights are in memory only while the samples come
        finish(seen[0])
    for finish in model.after_last_block([random_sample()]):
        states = seen[0].clone().requires_grad_()
        torch.testing.assert_close(finish(states), noise_prediction)
        finish(states).sum().backward()
        assert states.grad is not None and bool((states.grad != 0).any())


def random_sample() -> CalibrationSample:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 36, 2, 8, 8, generator=generator), "timestep": torch.tensor([950.0]),
        "encoder_hidden_states": torch.randn(1, 12, 128, generator=generator),
    }  # fmt: skip
    return CalibrationSample("random", Expert.HIGH_NOISE, 950.0, 0, "conditional", inputs)


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
    with pytest.raises(ModelError, match=r"text_encoder.*is not a whole safetensors file"):
        load_pipeline(folder, "cpu")
