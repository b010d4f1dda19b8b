"""A linear whose weight alone has four bits is the product with its dequantized weight."""

import dataclasses

import pytest
import torch

from tempoquant import set_activation_bits
from tempoquant.errors import CheckpointError
from tempoquant.exact_products import exact_linear
from tempoquant.formats import FORMATS, Format
from tempoquant.kernels import weights_alone
from tempoquant.kernels.reference import dequantize_residual
from tempoquant.kernels.weights_alone import multiply_weights_alone, weights_alone_linear
from tempoquant.layer import QuantizedLayer
from tempoquant.runtime.linear import QuantizedLinear
from tests.random_layers import BINS, random, random_layer, random_linear

IN, OUT = 192, 70
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def layer_of(format: Format) -> QuantizedLayer:
    """Make a random layer of three timestep bins, without a transform of its input."""
    plain = random_layer(random_linear(IN, OUT), format, BINS, rank=0, smoothed=False, centred=False)
    return dataclasses.replace(plain, weights_alone=True, clip_ratio=torch.ones(BINS.num_bins))


@each_format
def test_it_is_the_product_of_the_input_as_it_comes(format: Format) -> None:
    layer = layer_of(format)
    x = random(3, IN, dtype=torch.float64)
    bias = None if layer.bias is None else layer.bias.double()
    wanted = exact_linear(x, dequantize_residual(layer.weight_tensors, format, torch.float64), bias)
    assert torch.equal(weights_alone_linear(x, layer.weight_tensors, format), wanted)


@each_format
def test_how_many_rows_are_expanded_at_once_changes_nothing(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(format), random(2, 5, IN)
    at_once = weights_alone_linear(x, layer.weight_tensors, format)
    monkeypatch.setattr(weights_alone, "NUMBERS_AT_ONCE", 16 * IN + 5)
    in_parts = weights_alone_linear(x, layer.weight_tensors, format)
    assert at_once.shape == in_parts.shape == (2, 5, OUT)
    torch.testing.assert_close(in_parts, at_once, rtol=0, atol=IN * 2.0**-24 * float(at_once.abs().max()))


@each_format
def test_kernels_agree_with_the_definition(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(format), random(3, IN).bfloat16()
    monkeypatch.setattr(weights_alone, "EXPANDED_AT_ONCE", 48 * IN)
    found = multiply_weights_alone(x, layer.weight_tensors, format, "fp8").double()
    wanted = weights_alone_linear(x.double(), layer.weight_tensors, format)
    # The result is rounded once, and INT4's weights once more: 2^-9 of what is summed.
    size = x.double().abs() @ dequantize_residual(layer.weight_tensors, format, torch.float64).abs().T
    assert ((found - wanted).abs() <= 2.0**-8 * size + 2.0**-8 * wanted.abs()).all()


def test_it_needs_no_timestep_and_heeds_no_activation_bits() -> None:
    linear = QuantizedLinear.from_layer(layer_of(FORMATS["nvfp4_m1"]))
    x = random(2, IN)  # rows that are no rows of a batch: timesteps of a video and of its sound
    in_sixteen = linear(x)
    set_activation_bits(linear, 8)
    assert torch.equal(linear(x), in_sixteen)
    with linear.at_timestep(torch.tensor([10.0, 950.0, 990.0])):
        assert torch.equal(linear(x), in_sixteen)


def test_its_gradient_is_that_of_the_product() -> None:
    linear = QuantizedLinear.from_layer(layer_of(FORMATS["mxfp4"]))
    x = random(2, IN).requires_grad_()
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.dequantize().sum(0).expand(2, IN))


def test_a_layer_cannot_keep_its_input_and_change_it() -> None:
    changed = dataclasses.replace(random_layer(random_linear(IN, OUT), "mxfp4", BINS), weights_alone=True)
    with pytest.raises(CheckpointError, match="weights_alone needs an input that nothing is done to"):
        QuantizedLinear.from_layer(changed)
