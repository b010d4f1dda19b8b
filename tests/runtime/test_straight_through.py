"""Training through a 4-bit layer: the value is the 4-bit one, the gradient the dequantized layer's,
nothing is kept.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tempoquant.errors import UnsupportedError
from tempoquant.formats import FORMATS
from tempoquant.hosts.nunchaku.linear import NunchakuLinear
from tempoquant.kernels import input_gradient
from tempoquant.quantizing import quantize_linear
from tempoquant.runtime import QuantizedLinear, install_layers
from tempoquant.timesteps import TimestepBins
from tempoquant.tiny import weights_folder
from tests.quantized_wan import inputs, load, quantize_all, tiny_wan, write_component
from tests.random_layers import random_layer
from tests.runtime.test_linear import SOURCE, X, each_set

GRAD_Y = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))


def module(format: str = "nvfp4_m1", rotated: bool = True, **has: Any) -> QuantizedLinear:
    return QuantizedLinear.from_layer(random_layer(SOURCE, format, TimestepBins(), rotated=rotated, **has))


def gradient_of(linear: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Compute the gradient of X, for GRAD_Y."""
    x = X.to(dtype, copy=True).requires_grad_()
    linear(x).backward(GRAD_Y.to(dtype))
    assert x.grad is not None and x.grad.dtype == dtype
    return x.grad


def dequantized(linear: QuantizedLinear, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = linear.dequantize().to(dtype)
    return lambda x: functional.linear(x, weight)


@pytest.mark.parametrize("format", FORMATS)
@each_set
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_the_dequantized_layers_and_the_value_the_four_bit_one(
    format: str, has: dict[str, Any], rotated: bool, dtype: torch.dtype
) -> None:
    linear = module(format, rotated, **has)
    assert torch.equal(gradient_of(linear, dtype), gradient_of(dequantized(linear, dtype), dtype))
    x = X.to(dtype, copy=True)
    with torch.no_grad():
        wanted = linear(x)
    assert torch.equal(linear(x.requires_grad_()), wanted)


def test_an_exported_layer_has_the_dequantized_layers_gradient_too() -> None:
    layer = random_layer(SOURCE, "nvfp4", TimestepBins(), deflated=False, centred=False)
    linear = NunchakuLinear.from_layer(layer)
    assert torch.equal(gradient_of(linear), gradient_of(dequantized(linear, torch.float32)))


def test_a_weight_dequantized_some_rows_at_a_time_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = module()
    whole = gradient_of(linear)
    monkeypatch.setattr(input_gradient, "NUMBERS_AT_ONCE", 5 * 128)
    torch.testing.assert_close(gradient_of(linear), whole, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_needs_nothing_but_the_layers_own_tensors() -> None:
    linear = module()
    own = {parameter.data_ptr() for parameter in linear.parameters()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(X.clone().requires_grad_())
    assert kept and {tensor.data_ptr() for tensor in kept} <= own


def test_an_input_that_asks_for_no_gradient_records_none() -> None:
    assert not module()(X).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_has_the_same_gradient(reentrant: bool) -> None:
    linear = module()
    assert torch.equal(gradient_of(lambda x: checkpoint(linear, x, use_reentrant=reentrant)), gradient_of(linear))


def test_autocast_changes_neither_value_nor_gradient() -> None:
    linear = module()
    wanted = linear(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(X), wanted)
        inside = gradient_of(linear)
    assert torch.equal(inside, gradient_of(linear))


def test_a_second_derivative_is_refused_by_name() -> None:
    x = X.clone().requires_grad_()
    y = module()(x)
    with pytest.raises(UnsupportedError, match="create_graph=False"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("name", ["bias", "up", "down", "deflation"])
def test_training_a_tensor_of_the_layer_itself_is_refused_by_name(name: str) -> None:
    linear = module()
    getattr(linear, name).requires_grad_()
    with pytest.raises(UnsupportedError, match=f"^{name} of a 4-bit layer"):
        linear(X)
    with torch.no_grad():
        linear(X)


def lora_gradient(model: Any, checkpointed: bool = False, **call: Any) -> torch.Tensor:
    """Compute the gradient of the upper halves of fresh LoRAs on q and v, as in diffusers' training
    scripts.
    """
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"]))
    model.train()
    if checkpointed:
        model.enable_gradient_checkpointing()
    model(**call)[0].float().pow(2).mean().backward()
    return torch.cat([p.grad.flatten().float() for name, p in model.named_parameters() if "lora_B" in name])


def test_a_lora_on_four_bits_gets_nearly_the_gradient_that_it_gets_on_sixteen() -> None:
    """The bundled model is rounded to nearest, the recipe of the largest error."""
    sixteen = WanTransformer3DModel.from_pretrained(weights_folder() / "transformer")
    four = copy.deepcopy(sixteen)
    linears = {name: linear for name, linear in four.blocks.named_modules() if isinstance(linear, nn.Linear)}
    layers = {
        f"blocks.{name}": quantize_linear(linear.weight, linear.bias, None, "rtn").to_layer()
        for name, linear in linears.items()
    }
    install_layers(four, layers, TimestepBins(), torch.float32)
    call = inputs(timestep=700.0, dtype=torch.float32)
    call["encoder_hidden_states"] = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(2))
    wanted, found = lora_gradient(sixteen, **call), lora_gradient(four, **call)
    assert functional.cosine_similarity(wanted, found, 0) > 0.95 and 0.9 < found.norm() / wanted.norm() < 1.1


def test_a_loaded_expert_says_that_it_is_trainable_and_checkpointing_changes_no_gradient(tmp_path: Any) -> None:
    model = tiny_wan()
    folder = write_component(tmp_path / "expert", model, quantize_all(model))
    assert load(folder).hf_quantizer.is_trainable
    found = lora_gradient(load(folder), True, **inputs(timestep=960.0))
    assert found.norm() > 0 and torch.equal(found, lora_gradient(load(folder), False, **inputs(timestep=960.0)))
