"""Whole tensors on a format's grid."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.formats import (
    FORMATS,
    Format,
    ScaleRule,
    from_codes,
    group_amax,
    group_scale,
    quantize_activation,
    to_codes,
    weight_scale,
)
from tests.random_layers import random

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
each_rule = pytest.mark.parametrize("rule", ScaleRule)


@each_format
@each_rule
def test_codes_survive_decoding_with_any_scale_on_the_grid(format: Format, rule: ScaleRule):
    codes = torch.randint(-7, 8, (5, 3 * format.group_size), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scale = group_scale(random(5, 3).abs(), format, rule)
    assert torch.equal(to_codes(from_codes(codes, scale, format), scale, format), codes)


@each_format
@given(seed=st.integers(0, 999))
def test_numbers_on_the_grid_come_back_unchanged_at_clip_ratio_one(format: Format, seed: int):
    """Groups whose largest code is 7 choose the same scale again, and then every code."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (4, 2 * format.group_size), generator=generator).to(torch.int8)
    codes[:, :: format.group_size] = 7
    scale = torch.ldexp(torch.ones(4, 2), torch.randint(-5, 6, (4, 2), generator=generator))
    x = from_codes(codes, scale, format)
    assert torch.equal(quantize_activation(x, format, ScaleRule.CEIL), x)


@each_format
@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.CEIL])
@given(seed=st.integers(0, 999))
def test_inside_the_top_level_the_error_is_at_most_half_a_step(format: Format, rule: ScaleRule, seed: int):
    x = random(4, 2 * format.group_size, seed=seed)
    scale = group_scale(group_amax(x, format), format, rule).repeat_interleave(format.group_size, -1)
    largest_step = max(b - a for a, b in itertools.pairwise(format.levels))
    inside = x.abs() <= format.top_level * scale
    error = (quantize_activation(x, format, rule) - x).abs()
    assert bool((error[inside] <= largest_step / 2 * scale[inside] * (1 + 2.0**-22)).all())


@each_format
@each_rule
def test_a_group_sees_no_other_group(format: Format, rule: ScaleRule):
    x = random(3, 4 * format.group_size)
    halves = [quantize_activation(half, format, rule) for half in x.chunk(2, dim=-1)]
    assert torch.equal(quantize_activation(x, format, rule), torch.cat(halves, dim=-1))
    rows = [quantize_activation(row, format, rule) for row in x]
    assert torch.equal(quantize_activation(x, format, rule), torch.stack(rows))


@each_format
@each_rule
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_group_that_is_not_finite_becomes_nan_and_never_a_number(format: Format, rule: ScaleRule, bad: float):
    x = random(2, 3 * format.group_size)
    x[0, format.group_size + 1] = bad
    y = quantize_activation(x, format, rule)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[0, format.group_size : 2 * format.group_size] = True
    assert bool(torch.isnan(y[expected]).all()) and not bool(torch.isnan(y[1]).any())
    if format.scale_octaves is None:  # otherwise its row may be lost with it
        assert torch.equal(torch.isnan(y), expected)


@each_format
@each_rule
def test_a_group_of_zeros_stays_zero(format: Format, rule: ScaleRule):
    zeros = torch.zeros(2, 2 * format.group_size)
    assert torch.equal(quantize_activation(zeros, format, rule), zeros)


@each_format
@each_rule
def test_a_tensor_of_clip_ratios_does_to_each_group_what_a_number_does(format: Format, rule: ScaleRule):
    x = random(2, 2 * format.group_size)
    ratios = torch.tensor([0.6, 1.0])
    both = quantize_activation(x, format, rule, ratios)
    for group, ratio in enumerate(ratios.tolist()):
        columns = slice(group * format.group_size, (group + 1) * format.group_size)
        single = quantize_activation(x[:, columns], format, rule, torch.tensor(ratio))
        assert torch.equal(both[:, columns], single)


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_are_kept(format: Format, dtype: torch.dtype):
    x = random(2, 5, format.group_size, dtype=dtype)
    y = quantize_activation(x, format, ScaleRule.CEIL)
    assert y.dtype == dtype and y.shape == x.shape


@each_format
@each_rule
def test_float64_makes_the_decisions_of_float32_on_float32_numbers(format: Format, rule: ScaleRule):
    """Away from ties: random numbers meet none. Division in float32 may round onto a tie, so codes
    of noise only.
    """
    x = random(64, 2 * format.group_size)
    assert torch.equal(quantize_activation(x, format, rule).double(), quantize_activation(x.double(), format, rule))


@each_format
@each_rule
def test_scales_of_a_weight_are_on_the_grid_before_a_code_is_chosen(format: Format, rule: ScaleRule):
    weight = random(6, 3 * format.group_size)
    scale = weight_scale(weight, format, rule)
    assert scale.group.shape == (6, 3) and scale.tensor.shape == ()
    restored = from_codes(to_codes(weight, scale.effective, format), scale.effective, format)
    assert bool(
        (
            (restored - weight).abs() <= format.top_level / 2 * scale.effective.repeat_interleave(format.group_size, 1)
        ).all()
    )
