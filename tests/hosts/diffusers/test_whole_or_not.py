"""An operation that cannot apply to the whole of a 4-bit model is refused before any part of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from tempoquant.errors import UnsupportedError
from tempoquant.hosts.diffusers.loader import register
from tests.quantized_wan import load, quantize_all, run, tiny_wan, write_component, write_pipeline

register()
MODEL = tiny_wan(num_layers=1)
BOTH = ["time_proj", "to_q", "proj_out"]  # a 16-bit layer before the 4-bit ones, and one after them


def config(*modules: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": list(modules or BOTH), **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_component(tmp_path_factory.mktemp("component") / "c", MODEL, quantize_all(MODEL))


def tuner_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def merge_layer_by_layer(model: Any) -> None:
    for layer in tuner_layers(model):
        layer.merge()


def merge_second_adapter_too(model: Any) -> None:
    model.add_adapter(config("proj_out"), "y")
    model.set_adapters(["y", "x"])
    model.fuse_lora(adapter_names=["y", "x"])


FUSES: dict[str, Callable[[Any], None]] = {
    "fuse_lora": lambda model: model.fuse_lora(),
    "fuse_lora, scaled": lambda model: model.fuse_lora(lora_scale=0.5),
    "fuse_lora, safe": lambda model: model.fuse_lora(safe_fusing=True),
    "two adapters": merge_second_adapter_too,
    "layer by layer": merge_layer_by_layer,
}


@pytest.mark.parametrize("how", FUSES)
def test_a_refused_fuse_changes_no_layer(how: str, folder: Path) -> None:
    model = load(folder)
    weights, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, run(model)
    model.add_adapter(config(), "x")
    adapted = run(model)
    with pytest.raises(UnsupportedError, match="'x' changes 4-bit layers"):
        FUSES[how](model)
    model.set_adapters(["x"])
    assert torch.equal(run(model), adapted) and not any(layer.merged for layer in tuner_layers(model))
    model.set_adapters(["x"], [0.0])
    assert torch.equal(run(model), before)
    model.delete_adapters(list(model.peft_config))
    assert torch.equal(run(model), before)
    model.unload_lora()
    after = model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_refused_merge_of_peft_changes_no_layer(verb: str, folder: Path) -> None:
    model = load(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = get_peft_model(model, config())
    with pytest.raises(UnsupportedError, match="'default' changes 4-bit layers"):
        getattr(wrapped, verb)()
    after = wrapped.unload().state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


def test_a_pipeline_fuses_into_both_experts_or_into_none(tmp_path: Path) -> None:
    pipe = WanImageToVideoPipeline.from_pretrained(write_pipeline(tmp_path / "quantized"), dtype=torch.bfloat16)
    pipe.transformer.add_adapter(config("proj_out"), "x")
    pipe.transformer_2.add_adapter(config(), "x")
    with pytest.raises(UnsupportedError, match="keep LoRA adapters loaded"):
        pipe.fuse_lora(components=["transformer", "transformer_2"])
    assert not pipe.transformer.proj_out.merged
    pipe.fuse_lora(components=["transformer"])
    assert pipe.transformer.proj_out.merged


def test_an_adapter_of_16_bit_layers_fuses_beside_another_one_of_4_bit_layers(folder: Path) -> None:
    model = load(folder, torch.float32)
    model.add_adapter(config("proj_out", "time_proj"), "x")
    model.add_adapter(config("to_q"), "y")
    model.set_adapters(["x", "y"])
    before = run(model, torch.float32)
    model.fuse_lora(adapter_names=["x"])
    assert model.proj_out.merged_adapters == ["x"]
    torch.testing.assert_close(run(model, torch.float32), before, rtol=1e-4, atol=1e-4)


AGAIN: list[Callable[[Any], None]] = [
    lambda model: model.fuse_lora(adapter_names=["x"]),
    lambda model: model.fuse_lora(adapter_names=["x"]),
    lambda model: model.set_adapters(["x", "y"], [0.5, 2.0]),
    lambda model: model.fuse_lora(adapter_names=["z"]),
    lambda model: model.unfuse_lora(),
    lambda model: model.unfuse_lora(),
    lambda model: model.fuse_lora(lora_scale=0.5, adapter_names=["x"]),
    lambda model: model.set_adapters(["x", "y", "z"]),
    lambda model: model.fuse_lora(adapter_names=["z", "x"]),
    lambda model: model.unfuse_lora(),
    lambda model: model.delete_adapters("z"),
    lambda model: model.fuse_lora(adapter_names=["x"]),
]


def test_fusing_again_does_to_16_bit_layers_what_it_does_in_a_16_bit_model(folder: Path) -> None:
    models = [load(folder, torch.float32), load(folder, torch.float32).dequantize()]
    for model in models:
        torch.manual_seed(0)
        model.add_adapter(config("proj_out", "time_proj"), "x")
        model.add_adapter(config("to_q"), "y")
        model.add_adapter(config("proj_out"), "z")
        model.set_adapters(["x", "y", "z"])
    for step in AGAIN:
        for model in models:
            step(model)
        ours, theirs = ({name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
                         and not name.endswith("to_q")} for model in models)  # fmt: skip
        assert len(ours) == 2 and ours.keys() == theirs.keys()
        for name, layer in ours.items():
            assert torch.equal(layer.get_base_layer().weight, theirs[name].get_base_layer().weight)
            assert layer.merged_adapters == theirs[name].merged_adapters and layer.scaling == theirs[name].scaling
    merged, weights = models[0].proj_out.merged_adapters, models[0].proj_out.get_base_layer().weight.clone()
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="'y' changes 4-bit layers"):
            models[0].fuse_lora()
    assert models[0].proj_out.merged_adapters == merged == ["x"]
    assert torch.equal(models[0].proj_out.get_base_layer().weight, weights)


def test_a_dequantized_model_fuses(folder: Path) -> None:
    model = load(folder, torch.float32)
    model.add_adapter(config(), "x")
    model.dequantize()
    before = run(model, torch.float32)
    model.fuse_lora()
    assert all(layer.merged for layer in tuner_layers(model))
    torch.testing.assert_close(run(model, torch.float32), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
@pytest.mark.parametrize("others", [[], ["other"]])
def test_an_adapter_that_needs_dense_weights_leaves_nothing(
    settings: dict[str, Any], others: list[str], folder: Path
) -> None:
    model = load(folder, torch.float32)
    for name in others:
        model.add_adapter(config("to_q"), name)
    weights, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, run(model, torch.float32)
    with pytest.raises(UnsupportedError, match="'x' would begin from the dense weights"):
        model.add_adapter(config(**settings), "x")
    after = model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(run(model, torch.float32), before) and list(getattr(model, "peft_config", {})) == others
