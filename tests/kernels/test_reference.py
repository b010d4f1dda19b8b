"""The reference kernel is the arithmetic it claims to be."""

from typing import Any

import pytest
import torch

from tempoquant.formats import (
    FORMATS,
    Format,
    ScaleRule,
    from_codes,
    quantize_activation,
    quantize_activation_to_8_bits,
    rotate,
    to_codes,
    weight_scale,
)
from tempoquant.input_transform import InputTransform
from tempoquant.kernels import reference
from tempoquant.kernels.reference import WeightTensors, dequantize_residual, w4a4_linear
from tempoquant.timesteps import TimestepBins
from tests.random_layers import random, random_layer, random_linear

NUM_TOKENS, OUT, RANK = 7, 6, 3
FLOAT32_UNIT, BFLOAT16_UNIT = 2.0**-24, 2.0**-9
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
each_rule = pytest.mark.parametrize("rule", ScaleRule)


def layer_of(format: Format, **has: Any) -> tuple[InputTransform, WeightTensors]:
    """Make a random layer's two halves; `has` as for `random_layer`, and `bias`."""
    bias, has = has.get("bias", True), {key: value for key, value in has.items() if key != "bias"}
    linear = random_linear(3 * format.group_size, OUT)
    layer = random_layer(linear, format, TimestepBins(), **{"rank": RANK, "size": 0.3} | has)
    weight = layer.weight_tensors
    return layer.input_transform, weight if bias else weight._replace(bias=None)


PLAIN = {"smoothed": False, "rank": 0, "centred": False, "bias": False}


def in_float64(
    x: torch.Tensor, transform: InputTransform, weight: WeightTensors, format: Format, rule: ScaleRule, ratio: float
) -> torch.Tensor:
    """Compute the formulas of both modules, operand by operand."""
    x = x.double()
    z = x if transform.smoothing_factor is None else x / transform.smoothing_factor.double()
    if transform.rotated:
        z = rotate(z)
    if transform.down is not None and transform.deflation is not None:
        z = z - x @ transform.down.double().T @ transform.deflation.double().T
    if transform.input_offset is not None:
        z = z - transform.input_offset.double()
    y = quantize_activation(z, format, rule, ratio) @ dequantize_residual(weight, format, torch.float64).T
    if weight.up is not None and transform.down is not None:
        y = y + x @ transform.down.double().T @ weight.up.double().T
    return y if weight.bias is None else y + weight.bias.double()


@each_format
@each_rule
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("rank", "deflated"), [(0, False), (RANK, False), (RANK, True)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("bias", "rotated"), [(False, False), (True, False), (True, True)])
def test_in_float64_the_linear_is_the_product_of_its_dequantized_operands(
    format, rule, smoothed, rank, deflated, centred, bias, rotated
):
    layer = layer_of(
        format, smoothed=smoothed, rank=rank, deflated=deflated, centred=centred, bias=bias, rotated=rotated
    )
    x = random(NUM_TOKENS, 3 * format.group_size).double()
    wanted = in_float64(x, *layer, format, rule, 0.8)
    torch.testing.assert_close(w4a4_linear(x, *layer, format, rule, 0.8), wanted, rtol=1e-12, atol=1e-12)


@each_format
@each_rule
def test_in_float32_only_the_sum_rounds(format: Format, rule: ScaleRule):
    """Operands are exact in float32, so the error is bounded by that of a sum of `in_features`
    terms.
    """
    transform, weight = layer_of(format, **PLAIN)
    x = random(NUM_TOKENS, 3 * format.group_size)
    operands = quantize_activation(x, format, rule), dequantize_residual(weight, format)
    bound = x.shape[1] * FLOAT32_UNIT * (operands[0].double().abs() @ operands[1].double().abs().T)
    error = w4a4_linear(x, transform, weight, format, rule).double() - operands[0].double() @ operands[1].double().T
    assert bool((error.abs() <= bound).all())


@each_format
def test_a_16_bit_result_is_the_float32_result_rounded_once(format: Format):
    layer = layer_of(format)
    for dtype in (torch.bfloat16, torch.float16):
        x = random(NUM_TOKENS, 3 * format.group_size).to(dtype)
        wide = w4a4_linear(x.float(), *layer, format, ScaleRule.CEIL)
        assert torch.equal(w4a4_linear(x, *layer, format, ScaleRule.CEIL), wide.to(dtype))


@each_format
def test_the_branch_reads_the_raw_input_and_not_the_smoothed_one(format: Format):
    transform, weight = layer_of(format, deflated=False, bias=False)
    x = random(NUM_TOKENS, 3 * format.group_size).double()
    alone = w4a4_linear(x, transform._replace(down=None), weight._replace(up=None), format, ScaleRule.CEIL)
    branch = x @ (weight.up.double() @ transform.down.double()).T
    y = w4a4_linear(x, transform, weight, format, ScaleRule.CEIL)
    torch.testing.assert_close(y - alone, branch, rtol=1e-12, atol=1e-12)


@each_format
def test_smoothing_divides_the_input_as_dividing_it_beforehand_does(format: Format):
    """The factors are powers of two, so division is exact, and the two are equal to the bit."""
    transform, weight = layer_of(format, smoothed=False, rank=0)  # an offset comes after the division
    x = random(NUM_TOKENS, 3 * format.group_size)
    factor = 2.0 ** torch.randint(-3, 4, (x.shape[1],), generator=torch.Generator().manual_seed(0))
    smoothed = w4a4_linear(x, transform._replace(smoothing_factor=factor), weight, format, ScaleRule.CEIL)
    assert torch.equal(smoothed, w4a4_linear(x / factor, transform, weight, format, ScaleRule.CEIL))


@each_format
def test_what_deflation_and_offset_take_off_is_what_taking_it_off_beforehand_does(format: Format):
    centred, weight = layer_of(format, smoothed=False, rank=0, bias=False)
    x, offset = random(NUM_TOKENS, 3 * format.group_size).double(), centred.input_offset
    taken_off = w4a4_linear(x - offset.double(), InputTransform(), weight, format, ScaleRule.CEIL)
    assert torch.equal(w4a4_linear(x, centred, weight, format, ScaleRule.CEIL), taken_off)
    deflated, with_up = layer_of(format, smoothed=False, centred=False, bias=False)
    less = x - x @ deflated.down.double().T @ deflated.deflation.double().T
    alone = w4a4_linear(less, InputTransform(), weight, format, ScaleRule.CEIL)
    branch = x @ (with_up.up.double() @ deflated.down.double()).T
    y = w4a4_linear(x, deflated, with_up, format, ScaleRule.CEIL)
    torch.testing.assert_close(y, alone + branch, rtol=1e-12, atol=1e-12)


@each_format
def test_leading_dimensions_are_batch_dimensions(format: Format):
    layer = layer_of(format)
    x = random(2, 3, 3 * format.group_size).double()
    flat = w4a4_linear(x.flatten(0, 1), *layer, format, ScaleRule.CEIL)
    torch.testing.assert_close(
        w4a4_linear(x, *layer, format, ScaleRule.CEIL).flatten(0, 1), flat, rtol=1e-12, atol=1e-12
    )
    assert w4a4_linear(x[:0], *layer, format, ScaleRule.CEIL).shape == (0, 3, OUT)


@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_activation_makes_its_token_nan_and_no_other(format: Format, bad: float):
    layer = layer_of(format)
    x = random(NUM_TOKENS, 3 * format.group_size)
    x[2, 5] = bad
    y = w4a4_linear(x, *layer, format, ScaleRule.CEIL)
    assert torch.isnan(y).all(dim=1).tolist() == [token == 2 for token in range(NUM_TOKENS)]


@each_format
def test_the_residual_is_exactly_code_times_stored_scale(format: Format):
    linear = random_linear(3 * format.group_size, OUT)
    stored = random_layer(linear, format, TimestepBins(), smoothed=False).weight_tensors
    weight = linear.weight
    scale = weight_scale(weight, format, ScaleRule.FLOOR).effective
    assert torch.equal(dequantize_residual(stored, format), from_codes(to_codes(weight, scale, format), scale, format))


def test_a_clip_ratio_of_a_half_with_large_inputs_saturates_at_half_the_range():
    format = FORMATS["mxfp4"]
    layer = layer_of(format, **PLAIN)
    x = torch.full((1, 3 * format.group_size), 6.0).double()
    full, half = (w4a4_linear(x, *layer, format, ScaleRule.CEIL, ratio) for ratio in (1.0, 0.5))
    torch.testing.assert_close(half, full / 2, rtol=1e-12, atol=0)


@each_format
@pytest.mark.parametrize("batches", [1, 3])
def test_tokens_computed_in_chunks_are_those_computed_at_once(format: Format, batches: int, monkeypatch):
    layer = layer_of(format)
    x = random(batches, 11, 3 * format.group_size).double()
    clip_ratio = torch.linspace(0.7, 1.0, batches).reshape(batches, 1, 1)
    per_token = torch.arange(11).reshape(11, 1) % 2 == 0
    whole = w4a4_linear(x, *layer, format, ScaleRule.CEIL, clip_ratio, per_token)
    monkeypatch.setattr(reference, "NUMBERS_AT_ONCE", 4 * batches * 3 * format.group_size)
    chunked = w4a4_linear(x, *layer, format, ScaleRule.CEIL, clip_ratio, per_token)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    w4a4_linear(x, *layer, format, ScaleRule.CEIL, clip_ratio, per_token).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum(-1).all())


@each_format
def test_tokens_in_eight_bits_are_rounded_to_eight_and_the_others_to_four(format: Format):
    layer = layer_of(format, **PLAIN)
    x = random(NUM_TOKENS, 3 * format.group_size).double()
    weight = dequantize_residual(layer[1], format, torch.float64)
    in_eight, in_four = quantize_activation_to_8_bits(x, format), quantize_activation(x, format, ScaleRule.CEIL)
    which = torch.arange(NUM_TOKENS).reshape(-1, 1) % 2 == 0
    for eight_bits, rounded in ((False, in_four), (True, in_eight), (which, torch.where(which, in_eight, in_four))):
        y = w4a4_linear(x, *layer, format, ScaleRule.CEIL, 1.0, eight_bits)
        torch.testing.assert_close(y, rounded @ weight.T, rtol=1e-12, atol=1e-12)
