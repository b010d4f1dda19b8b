"""Scales: on the grid, exact to the last bit, and the same after storage."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tempoquant.errors import CheckpointError
from tempoquant.formats import (
    FORMATS,
    INT4,
    MXFP4,
    NVFP4,
    NVFP4_M1,
    Format,
    ScaleRule,
    check_scale_bytes,
    group_scale,
    scale_from_bytes,
    scale_to_bytes,
    weight_scale,
)
from tempoquant.formats.scales import E4M3_MAX, E4M3_MIN, tensor_scale_of

FLOAT32_MAX = torch.finfo(torch.float32).max
SMALLEST_SUBNORMAL = 2.0**-149
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
each_rule = pytest.mark.parametrize("rule", ScaleRule)
positive = st.floats(min_value=SMALLEST_SUBNORMAL, max_value=FLOAT32_MAX, width=32)
ordinary = st.floats(min_value=2.0**-60, max_value=2.0**60, width=32)


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def exact_exponent(amax: float, rule: ScaleRule) -> int:
    """Compute OCP MX v1.0's exponent for E2M1 in whole numbers: floor(log2(amax)) − 2, or the least
    e with 6·2^e ≥ amax.
    """
    if rule is ScaleRule.FLOOR:
        exponent = floor_log2(Fraction(amax)) - 2
    else:
        ratio = Fraction(amax) / 6
        floor = floor_log2(ratio)
        exponent = floor if Fraction(2) ** floor == ratio else floor + 1
    return max(-126, min(127, exponent))


@each_rule
@given(amax=positive)
@example(amax=FLOAT32_MAX)
@example(amax=SMALLEST_SUBNORMAL)
@example(amax=2.0**-126)
@example(amax=6.0)
@example(amax=math.nextafter(6.0, 7.0))
def test_e8m0_scales_follow_the_rule_in_exact_arithmetic(rule: ScaleRule, amax: float):
    scale = group_scale(torch.tensor([amax], dtype=torch.float32), MXFP4, rule)
    assert scale.item() == 2.0 ** exact_exponent(float(torch.tensor(amax, dtype=torch.float32)), rule)


@each_rule
def test_e8m0_scales_of_every_power_of_two_and_its_neighbours_are_exact(rule: ScaleRule):
    powers = torch.ldexp(torch.ones(277, dtype=torch.float64), torch.arange(-149, 128)).float()
    around = torch.cat(
        [powers, 1.5 * powers[1:], torch.nextafter(powers, 2 * powers), torch.nextafter(powers, 0 * powers)]
    )
    around = torch.cat(
        [around, torch.nextafter(1.5 * powers[1:], powers[1:]), torch.nextafter(1.5 * powers[1:], 2 * powers[1:])]
    )
    around = around[(around > 0) & torch.isfinite(around)]
    wanted = torch.tensor([2.0 ** exact_exponent(amax, rule) for amax in around.tolist()])
    assert torch.equal(group_scale(around, MXFP4, rule), wanted)


@given(amax=ordinary)
def test_under_the_ceil_rule_nothing_saturates_and_under_floor_by_less_than_a_third(amax: float):
    amax = torch.tensor([amax])
    assert amax <= 6 * group_scale(amax, MXFP4, ScaleRule.CEIL)
    assert amax < 8 * group_scale(amax, MXFP4, ScaleRule.FLOOR)


@each_rule
@given(amax=ordinary, clip_ratio=st.sampled_from([0.6, 0.7, 0.8, 0.9, 1.0]), offset=st.sampled_from([-1, 0, 1]))
def test_an_exponent_offset_folds_into_the_clip_ratio(rule: ScaleRule, amax: float, clip_ratio: float, offset: int):
    """ceil(log2(c·amax / 6)) + k = ceil(log2(c·2^k·amax / 6)), and the floor rule alike."""
    amax = torch.tensor([amax])
    folded = group_scale(amax, MXFP4, rule, clip_ratio * 2.0**offset)
    assert torch.equal(folded, group_scale(amax, MXFP4, rule, clip_ratio) * 2.0**offset)


@each_format
@each_rule
def test_a_group_of_zeros_has_scale_one(format: Format, rule: ScaleRule):
    assert group_scale(torch.zeros(2, 3), format, rule, 0.7).tolist() == [[1.0] * 3] * 2


@each_format
@each_rule
def test_a_group_that_is_not_finite_has_scale_nan_and_its_neighbours_do_not(format: Format, rule: ScaleRule):
    """If scales have a window, the whole row may be lost with the group: the token, or the output,
    is lost anyway.
    """
    amax = torch.tensor([1.0, torch.nan, torch.inf, 2.0])
    is_lost = torch.isnan(group_scale(amax.unsqueeze(1), format, rule)).squeeze(1)
    assert is_lost.tolist() == [False, True, True, False]
    together = torch.isnan(group_scale(amax, format, rule))
    assert together.tolist() == is_lost.tolist() if format.scale_octaves is None else bool(together[is_lost].all())


@each_format
@each_rule
def test_a_clip_ratio_above_one_cannot_push_a_finite_group_off_the_grid(format: Format, rule: ScaleRule):
    scale = group_scale(torch.tensor([FLOAT32_MAX]), format, rule, 2.0)
    assert torch.isfinite(scale).all() and scale >= group_scale(torch.tensor([FLOAT32_MAX]), format, rule)


@each_format
@each_rule
@given(amax=st.lists(positive, min_size=1, max_size=8), clip_ratio=st.sampled_from([0.6, 1.0, 1.8]))
def test_the_scale_stored_is_the_scale_used(format: Format, rule: ScaleRule, amax: list[float], clip_ratio: float):
    scale = group_scale(torch.tensor([amax], dtype=torch.float32), format, rule, clip_ratio)
    stored = scale_to_bytes(scale, format)
    assert stored.dtype == torch.uint8 and stored.shape == (1, len(amax) * format.scale_grid.num_bytes)
    assert torch.equal(scale_from_bytes(stored, format), scale)
    check_scale_bytes(stored, format, "here")


@each_format
def test_scale_bytes_survive_reading_and_writing(format: Format):
    """Every byte (pair) that stands for a positive finite number."""
    if format is INT4:
        stored = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.uint8).unsqueeze(0)
    else:
        stored = torch.arange(1, 255 if format is MXFP4 else 127).to(torch.uint8).unsqueeze(0)
    assert torch.equal(scale_to_bytes(scale_from_bytes(stored, format), format), stored)


@given(amax=st.floats(min_value=2.0**-40, max_value=2.0**40, width=32))
def test_bfloat16_scales_are_amax_over_seven_rounded_to_nearest(amax: float):
    scale = group_scale(torch.tensor([amax]), INT4, ScaleRule.CEIL).double()
    assert abs(scale.item() - amax / 7) <= amax / 7 * 2.0**-8


def test_e4m3_activation_scales_saturate_at_both_ends_of_the_grid():
    scale = group_scale(torch.tensor([1e-20, 1e20]), NVFP4, ScaleRule.CEIL)
    assert scale.tolist() == [E4M3_MIN, E4M3_MAX]


@given(seed=st.integers(0, 999), exponent=st.integers(-60, 60))
def test_the_tensor_scale_lands_the_largest_group_on_the_largest_e4m3(seed: int, exponent: int):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    scale = weight_scale(weight, NVFP4, ScaleRule.FLOOR)
    assert scale.group.max() == E4M3_MAX
    assert scale.tensor == weight.abs().max() / (6 * E4M3_MAX)
    assert torch.equal(scale.effective, scale.group * scale.tensor)


@pytest.mark.parametrize("format", [NVFP4, NVFP4_M1], ids=["nvfp4", "nvfp4_m1"])
@each_rule
def test_a_weight_times_a_power_of_two_changes_the_tensor_scale_alone(format: Format, rule: ScaleRule):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    first, second = (weight_scale(w, format, rule) for w in (weight, 16 * weight))
    assert torch.equal(first.group, second.group) and second.tensor == 16 * first.tensor


def test_an_all_zero_weight_has_tensor_scale_one():
    assert tensor_scale_of(torch.zeros(4, 2), NVFP4) == tensor_scale_of(torch.zeros(4, 2), NVFP4_M1) == 1


@pytest.mark.parametrize(
    ("format", "bad"),
    [
        (MXFP4, [255]),
        (NVFP4, [0x7F]),
        (NVFP4, [0]),
        (NVFP4, [0x81]),
        (NVFP4_M1, [0x7F]),
        (NVFP4_M1, [0]),
        (NVFP4_M1, [0x88]),
        (INT4, [0x80, 0x7F]),
        (INT4, [0, 0]),
        (INT4, [0x80, 0xBF]),
    ],
)
def test_stored_scales_that_are_not_positive_numbers_are_refused_by_name(format: Format, bad: list[int]):
    with pytest.raises(CheckpointError, match=r"blocks\.0\.q"):
        check_scale_bytes(torch.tensor([bad], dtype=torch.uint8), format, "blocks.0.q")
