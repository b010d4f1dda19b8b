"""Laws of conversion: by name, all or nothing, and only linears of the right shape."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tempoquant.checkpoint.tensors import entry_of
from tempoquant.errors import CheckpointError
from tempoquant.runtime.convert import install_layers, quantized_linears, replace_linears
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import BINS, inputs, quantize_all, tiny_wan
from tests.random_layers import random_layer


def test_every_named_linear_is_replaced_and_no_other() -> None:
    model = tiny_wan(num_layers=2)
    layers = quantize_all(model)
    assert {"blocks.0.attn1.to_out.0", "blocks.1.ffn.net.2"} < layers.keys() and len(layers) == 20
    install_layers(model, layers, BINS)
    assert quantized_linears(model).keys() == layers.keys()
    assert type(model.proj_out) is nn.Linear and type(model.condition_embedder.time_proj) is nn.Linear


def test_replacing_on_meta_allocates_nothing_and_leaves_the_rest() -> None:
    model = tiny_wan(num_layers=1)
    layers = quantize_all(model)
    replace_linears(model, {name: entry_of(layer) for name, layer in layers.items()}, BINS)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta == (name.rpartition(".")[0] in layers)


def test_some_layers_may_stay_in_16_bits() -> None:
    model = tiny_wan(num_layers=2)
    layers = {name: layer for name, layer in quantize_all(model).items() if name.startswith("blocks.1.")}
    install_layers(model, layers, BINS)
    assert type(model.blocks[0].attn1.to_q) is nn.Linear
    assert torch.isfinite(model(**inputs())[0]).all()


def test_a_full_rank_branch_reproduces_the_original() -> None:
    """Everything in the branch, zeros in the codes: what is left is the rounding of the branch to
    bfloat16.
    """
    source = nn.Linear(64, 64)
    source.weight.data = source.weight.data.bfloat16().float()
    from tempoquant.layer import LowRankBranch

    zero = nn.Linear(64, 64)
    zero.weight.data.zero_()
    branch = LowRankBranch(torch.eye(64).bfloat16(), source.weight.data.bfloat16())
    layer = replace(
        random_layer(zero, "int4", TimestepBins(), rank=0, smoothed=False), branch=branch, bias=source.bias.data
    )
    x = torch.randn(3, 64)
    torch.testing.assert_close(QuantizedLinear.from_layer(layer)(x), source(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.dequantize(), source.weight.data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blocks.7.attn1.to_q", {}, "no layer"),
        ("blocks.0.attn1.to_out.5", {}, "no layer"),
        ("blocks.0.attn1.norm_q", {}, "RMSNorm, not a linear"),
        ("patch_embedding", {}, "Conv3d, not a linear"),
        ("blocks.0.attn1.to_q", {"out_features": 64}, "128 × 128 in the model, but 64 × 128"),
        ("blocks.0.attn1.to_q", {"bias": None, "centred": False}, "contradicts"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_and_nothing_is_changed(name: str, change: dict, message: str) -> None:
    model = tiny_wan(num_layers=1)
    entry = entry_of(random_layer(model.blocks[0].attn1.to_q))
    before = dict(model.named_modules())
    with pytest.raises(CheckpointError, match=message):
        replace_linears(model, {"blocks.0.attn1.to_k": entry, name: replace(entry, **change)}, BINS)
    assert dict(model.named_modules()) == before and not model._forward_pre_hooks


class OneLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.a = linear

    def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.a(x)


def test_a_linear_without_a_bias_takes_a_centred_layer_with_one_and_no_other() -> None:
    source, x = nn.Linear(128, 64, bias=False), torch.randn(3, 128)
    model = OneLinear(source)
    uncentred = replace(random_layer(source, bins=TimestepBins(), centred=False), bias=torch.zeros(64))
    with pytest.raises(CheckpointError, match="without bias in the model"):
        install_layers(model, {"a": uncentred}, TimestepBins())
    assert model.a is source
    centred = random_layer(source, bins=TimestepBins())
    install_layers(model, {"a": centred}, TimestepBins())
    assert torch.equal(model(x, timestep=0), QuantizedLinear.from_layer(centred)(x))


def test_a_quantized_model_is_not_quantized_again() -> None:
    model = tiny_wan(num_layers=1)
    layers = quantize_all(model)
    install_layers(model, layers, BINS)
    with pytest.raises(CheckpointError, match="QuantizedLinear, not a linear"):
        install_layers(model, layers, BINS)
