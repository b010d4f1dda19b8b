"""Laws of loading centred layers: the bias keeps its 32 bits, is there where the model has none,
and is not counted twice when the model is dequantized.
"""

from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from tempoquant import quantize_linear
from tempoquant.checkpoint import iter_layers, read_config
from tempoquant.formats import FORMATS
from tempoquant.hosts.diffusers.loader import register
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import Recipe
from tempoquant.runtime.convert import quantized_linears
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import load, quantize_all, run, tiny_wan, write_component

register()
RECIPE = Recipe.load("default").replace(rank=4)
BINS = TimestepBins()


class TwoLinears(ModelMixin, ConfigMixin):
    """One linear with a bias, one without."""

    @register_to_config
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, 64, bias=False)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(hidden_states)))


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(400, 128, generator=torch.Generator().manual_seed(seed)) + 3


def made(format: str = "nvfp4_m1", dtype: torch.dtype = torch.bfloat16) -> tuple[TwoLinears, dict[str, QuantizedLayer]]:
    """Return a 16-bit model, and its layers quantized by the default recipe on their inputs."""
    torch.manual_seed(0)
    model, recipe = TwoLinears().to(dtype).requires_grad_(False), RECIPE.replace(format=format)
    seen = {"a": inputs(), "b": torch.relu(model.a(inputs().to(dtype))).float()}
    layers = {
        name: quantize_linear(linear.weight, linear.bias, seen[name], recipe).to_layer()
        for name, linear in (("a", model.a), ("b", model.b))
    }
    return model, layers


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_that_centring_made_loads_in_float32_whatever_dtype_is_asked_for(
    tmp_path: Path, format: str, dtype: torch.dtype
) -> None:
    model, layers = made(format)
    folder = write_component(tmp_path / "c", model, layers, BINS)
    entries = read_config(folder).layers
    assert all(entry.centred and entry.deflated and entry.bias == "float32" for entry in entries.values())
    loaded = TwoLinears.from_pretrained(folder, dtype=dtype)
    for name, linear in quantized_linears(loaded).items():
        assert linear.bias.dtype == torch.float32 and torch.equal(linear.bias, layers[name].bias)
        assert torch.equal(linear.input_offset, layers[name].input_offset)
        assert torch.equal(linear.deflation, layers[name].branch.deflation)
    y = loaded(inputs(1).to(dtype), timestep=torch.tensor(500.0))
    wanted = model.float()(inputs(1), None)
    assert (y.float() - wanted).norm() < 0.3 * (wanted - wanted.mean(0)).norm()


def test_a_model_with_centred_layers_saves_and_loads_again(tmp_path: Path) -> None:
    model, layers = made()
    loaded = TwoLinears.from_pretrained(write_component(tmp_path / "c", model, layers, BINS), dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "again")
    for name, layer in iter_layers(tmp_path / "again"):
        assert torch.equal(layer.bias, layers[name].bias) and layer.bias.dtype == torch.float32
        assert torch.equal(layer.input_offset, layers[name].input_offset)
    again = TwoLinears.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    x = inputs(1).bfloat16()
    assert torch.equal(again(x, timestep=torch.tensor(1.0)), loaded(x, timestep=torch.tensor(1.0)))


def test_a_dequantized_model_is_the_original_but_for_the_weights_rounding(tmp_path: Path) -> None:
    """The offset is in the bias no longer, and nobody takes it off the input."""
    model, layers = made(dtype=torch.float32)
    folder = write_component(tmp_path / "c", model, layers, BINS)
    dense = TwoLinears.from_pretrained(folder, dtype=torch.float32).dequantize()
    assert not quantized_linears(dense)
    for name, layer in layers.items():
        linear = dense.get_submodule(name)
        assert torch.equal(linear.weight, layer.dequantize()) and torch.equal(linear.bias, layer.effective_bias())
        assert not torch.equal(linear.bias, layer.bias)
    wanted = model.a(inputs(1))
    assert (dense.a(inputs(1)) - wanted).norm() < 0.15 * (wanted - wanted.mean(0)).norm()


def test_a_dequantized_wan_computes_what_its_layers_say(tmp_path: Path) -> None:
    model = tiny_wan(num_layers=1)
    layers = quantize_all(model, "mixed")
    dense = load(write_component(tmp_path / "c", model, layers), torch.float32).dequantize()
    for name, layer in layers.items():
        linear = dense.get_submodule(name)
        assert torch.equal(linear.weight, layer.dequantize()) and torch.equal(linear.bias, layer.effective_bias())
    assert bool(torch.isfinite(run(dense, torch.float32)).all())
