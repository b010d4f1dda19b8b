"""The reference kernel is the arithmetic it claims to be."""

import pytest
import torch

from tempoquant.formats import (
    FORMATS,
    Format,
    ScaleRule,
    from_codes,
    pack,
    quantize_activation,
    quantize_activation_to_8_bits,
    rotate,
    scale_to_bytes,
    to_codes,
    weight_scale,
)
from tempoquant.kernels import reference
from tempoquant.kernels.reference import LinearTensors, dequantize_residual, w4a4_linear
from tests.random_layers import random

NUM_TOKENS, OUT, RANK = 7, 6, 3
FLOAT32_UNIT, BFLOAT16_UNIT = 2.0**-24, 2.0**-9
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
each_rule = pytest.mark.parametrize("rule", ScaleRule)


def layer_tensors(
    format: Format, *, smoothing: bool = True, branch: bool = True, deflation: bool = True, offset: bool = True,
    bias: bool = True, rotated: bool = False,
) -> LinearTensors:  # fmt: skip
    in_features = 3 * format.group_size
    weight = random(OUT, in_features, seed=1)
    scale = weight_scale(weight, format, ScaleRule.FLOOR)
    return LinearTensors(
        packed=pack(to_codes(weight, scale.effective, format), format),
        scale=scale_to_bytes(scale.group, format),
        tensor_scale=scale.tensor if format.has_tensor_scale else None,
        smoothing_factor=random(in_features, seed=2).exp().bfloat16() if smoothing else None,
        up=random(OUT, RANK, seed=3).bfloat16() if branch else None,
        down=random(RANK, in_features, seed=4).bfloat16() if branch else None,
        deflation=0.1 * random(in_features, RANK, seed=6).bfloat16() if branch and deflation else None,
        input_offset=random(in_features, seed=7).bfloat16() if offset else None,
        bias=random(OUT, seed=5) if bias else None,
        rotated=rotated,
    )


def in_float64(
    x: torch.Tensor, tensors: LinearTensors, format: Format, rule: ScaleRule, clip_ratio: float
) -> torch.Tensor:
    """The formula of the module, operand by operand."""
    x = x.double()
    rounded = x if tensors.smoothing_factor is None else x / tensors.smoothing_factor.double()
    if tensors.rotated:
        rounded = rotate(rounded)
    if tensors.down is not None and tensors.deflation is not None:
        rounded = rounded - x @ tensors.down.double().T @ tensors.deflation.double().T
    if tensors.input_offset is not None:
        rounded = rounded - tensors.input_offset.double()
    y = quantize_activation(rounded, format, rule, clip_ratio) @ dequantize_residual(tensors, format, torch.float64).T
    if tensors.up is not None and tensors.down is not None:
        y = y + x @ tensors.down.double().T @ tensors.up.double().T
    return y if tensors.bias is None else y + tensors.bias.double()


@each_format
@each_rule
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize(("branch", "deflation"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("bias", "rotated"), [(False, False), (True, False), (True, True)])
def test_in_float64_the_linear_is_the_product_of_its_dequantized_operands(
    format, rule, smoothing, branch, deflation, offset, bias, rotated
):
    tensors = layer_tensors(
        format, smoothing=smoothing, branch=branch, deflation=deflation, offset=offset, bias=bias, rotated=rotated
    )
    x = random(NUM_TOKENS, 3 * format.group_size).double()
    wanted = in_float64(x, tensors, format, rule, 0.8)
    torch.testing.assert_close(w4a4_linear(x, tensors, format, rule, 0.8), wanted, rtol=1e-12, atol=1e-12)


@each_format
@each_rule
def test_in_float32_only_the_sum_rounds(format: Format, rule: ScaleRule):
    """Operands are exact in float32, so the error is bounded by that of a sum of `in_features` terms."""
    tensors = layer_tensors(format, smoothing=False, branch=False, offset=False, bias=False)
    x = random(NUM_TOKENS, 3 * format.group_size)
    operands = quantize_activation(x, format, rule), dequantize_residual(tensors, format)
    bound = x.shape[1] * FLOAT32_UNIT * (operands[0].double().abs() @ operands[1].double().abs().T)
    error = w4a4_linear(x, tensors, format, rule).double() - operands[0].double() @ operands[1].double().T
    assert bool((error.abs() <= bound).all())


@each_format
def test_a_16_bit_result_is_the_float32_result_rounded_once(format: Format):
    tensors = layer_tensors(format)
    for dtype in (torch.bfloat16, torch.float16):
        x = random(NUM_TOKENS, 3 * format.group_size).to(dtype)
        wide = w4a4_linear(x.float(), tensors, format, ScaleRule.CEIL)
        assert torch.equal(w4a4_linear(x, tensors, format, ScaleRule.CEIL), wide.to(dtype))


@each_format
def test_the_branch_reads_the_raw_input_and_not_the_smoothed_one(format: Format):
    tensors = layer_tensors(format, deflation=False, bias=False)
    x = random(NUM_TOKENS, 3 * format.group_size).double()
    alone = w4a4_linear(x, tensors._replace(up=None, down=None), format, ScaleRule.CEIL)
    branch = x @ (tensors.up.double() @ tensors.down.double()).T
    torch.testing.assert_close(w4a4_linear(x, tensors, format, ScaleRule.CEIL) - alone, branch, rtol=1e-12, atol=1e-12)


@each_format
def test_smoothing_divides_the_input_as_dividing_it_beforehand_does(format: Format):
    """With powers of two, division is exact, so the two are equal to the bit."""
    tensors = layer_tensors(format, smoothing=False, branch=False)  # an offset comes after the division
    x = random(NUM_TOKENS, 3 * format.group_size)
    factor = 2.0 ** torch.randint(-3, 4, (x.shape[1],), generator=torch.Generator().manual_seed(0))
    smoothed = w4a4_linear(x, tensors._replace(smoothing_factor=factor), format, ScaleRule.CEIL)
    assert torch.equal(smoothed, w4a4_linear(x / factor, tensors, format, ScaleRule.CEIL))


@each_format
def test_what_deflation_and_offset_take_off_is_what_taking_it_off_beforehand_does(format: Format):
    tensors = layer_tensors(format, smoothing=False, branch=False, bias=False)
    x, offset = random(NUM_TOKENS, 3 * format.group_size).double(), tensors.input_offset
    taken_off = w4a4_linear(x - offset.double(), tensors._replace(input_offset=None), format, ScaleRule.CEIL)
    assert torch.equal(w4a4_linear(x, tensors, format, ScaleRule.CEIL), taken_off)
    deflated = layer_tensors(format, smoothing=False, offset=False, bias=False)
    less = x - x @ deflated.down.double().T @ deflated.deflation.double().T
    alone = w4a4_linear(less, tensors._replace(input_offset=None), format, ScaleRule.CEIL)
    branch = x @ (deflated.up.double() @ deflated.down.double()).T
    torch.testing.assert_close(w4a4_linear(x, deflated, format, ScaleRule.CEIL), alone + branch, rtol=1e-12, atol=1e-12)


@each_format
def test_leading_dimensions_are_batch_dimensions(format: Format):
    tensors = layer_tensors(format)
    x = random(2, 3, 3 * format.group_size).double()
    flat = w4a4_linear(x.flatten(0, 1), tensors, format, ScaleRule.CEIL)
    torch.testing.assert_close(
        w4a4_linear(x, tensors, format, ScaleRule.CEIL).flatten(0, 1), flat, rtol=1e-12, atol=1e-12
    )
    assert w4a4_linear(x[:0], tensors, format, ScaleRule.CEIL).shape == (0, 3, OUT)


@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_activation_makes_its_token_nan_and_no_other(format: Format, bad: float):
    tensors = layer_tensors(format)
    x = random(NUM_TOKENS, 3 * format.group_size)
    x[2, 5] = bad
    y = w4a4_linear(x, tensors, format, ScaleRule.CEIL)
    assert torch.isnan(y).all(dim=1).tolist() == [token == 2 for token in range(NUM_TOKENS)]


@each_format
def test_the_residual_is_exactly_code_times_stored_scale(format: Format):
    tensors = layer_tensors(format)
    weight = random(OUT, 3 * format.group_size, seed=1)
    scale = weight_scale(weight, format, ScaleRule.FLOOR).effective
    assert torch.equal(dequantize_residual(tensors, format), from_codes(to_codes(weight, scale, format), scale, format))


def test_a_clip_ratio_of_a_half_with_large_inputs_saturates_at_half_the_range():
    format = FORMATS["mxfp4"]
    tensors = layer_tensors(format, smoothing=False, branch=False, offset=False, bias=False)
    x = torch.full((1, 3 * format.group_size), 6.0).double()
    full, half = (w4a4_linear(x, tensors, format, ScaleRule.CEIL, ratio) for ratio in (1.0, 0.5))
    torch.testing.assert_close(half, full / 2, rtol=1e-12, atol=0)


@each_format
@pytest.mark.parametrize("batches", [1, 3])
def test_tokens_computed_in_chunks_are_those_computed_at_once(format: Format, batches: int, monkeypatch):
    tensors = layer_tensors(format)
    x = random(batches, 11, 3 * format.group_size).double()
    clip_ratio = torch.linspace(0.7, 1.0, batches).reshape(batches, 1, 1)
    per_token = torch.arange(11).reshape(11, 1) % 2 == 0
    whole = w4a4_linear(x, tensors, format, ScaleRule.CEIL, clip_ratio, per_token)
    monkeypatch.setattr(reference, "NUMBERS_AT_ONCE", 4 * batches * 3 * format.group_size)
    chunked = w4a4_linear(x, tensors, format, ScaleRule.CEIL, clip_ratio, per_token)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    w4a4_linear(x, tensors, format, ScaleRule.CEIL, clip_ratio, per_token).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum(-1).all())


@each_format
def test_tokens_in_eight_bits_are_rounded_to_eight_and_the_others_to_four(format: Format):
    tensors = layer_tensors(format, smoothing=False, branch=False, offset=False, bias=False)
    x = random(NUM_TOKENS, 3 * format.group_size).double()
    weight = dequantize_residual(tensors, format, torch.float64)
    in_eight, in_four = quantize_activation_to_8_bits(x, format), quantize_activation(x, format, ScaleRule.CEIL)
    which = torch.arange(NUM_TOKENS).reshape(-1, 1) % 2 == 0
    for eight_bits, rounded in ((False, in_four), (True, in_eight), (which, torch.where(which, in_eight, in_four))):
        y = w4a4_linear(x, tensors, format, ScaleRule.CEIL, 1.0, eight_bits)
        torch.testing.assert_close(y, rounded @ weight.T, rtol=1e-12, atol=1e-12)
