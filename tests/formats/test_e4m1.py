"""Scales of one mantissa bit inside a window: an FP8 tensor core computes with them and loses
nothing.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.errors import CheckpointError
from tempoquant.formats import (
    NVFP4_M1,
    ScaleRule,
    check_scale_bytes,
    from_codes,
    group_amax,
    group_scale,
    quantize_activation,
    scale_from_bytes,
    scale_to_bytes,
    to_codes,
    weight_scale,
)
from tempoquant.formats.scales import E4M1_MAX, E4M1_MIN

GROUP, OCTAVES = NVFP4_M1.group_size, 12
TOP_EXPONENT = 5  # of a row's largest scale, relative to its base: 6 · 1.5 · 2^5 = 288 is below FP8's 448, 576 is not
each_rule = pytest.mark.parametrize("rule", ScaleRule)
clip_ratios = st.sampled_from([0.3, 0.6, 1.0, 1.8, torch.tensor([0.6, 1.0, 1.8, 0.3] * 3)])
sizes = st.integers(-30, 30)


def heavy_tailed(seed: int, size: int, num_groups: int = 12) -> torch.Tensor:
    """Return groups, (6, in), and numbers in a group, that differ by many orders of magnitude; some
    groups are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(6, num_groups, 1, generator=generator).mul(6).exp()
    spread = torch.where(torch.rand(spread.shape, generator=generator) < 0.1, torch.zeros(()), spread)
    x = torch.randn(6, num_groups, GROUP, generator=generator)
    return (x * torch.randn(x.shape, generator=generator).exp() * spread).flatten(1) * 2.0**size


def is_fp8(x: torch.Tensor) -> bool:
    return torch.equal(x.to(torch.float8_e4m3fn).to(x.dtype), x)


def is_one_mantissa_bit(scale: torch.Tensor) -> bool:
    mantissa, _ = torch.frexp(scale)
    inside = (scale >= E4M1_MIN) & (scale <= E4M1_MAX)
    return is_fp8(scale) and bool((inside & ((mantissa == 0.5) | (mantissa == 0.75))).all())


def base_of(scale: torch.Tensor) -> torch.Tensor:
    """Return a power of two for each row, (rows, 1), that puts the row's largest scale at
    TOP_EXPONENT.
    """
    exponent = torch.frexp(scale.amax(-1, keepdim=True)).exponent - 1 - TOP_EXPONENT
    return torch.ldexp(torch.ones_like(scale[:, :1]), exponent)


def test_every_level_times_every_scale_of_a_window_is_an_fp8_number() -> None:
    powers = 2.0 ** torch.arange(TOP_EXPONENT - OCTAVES, TOP_EXPONENT + 1)
    scales = torch.cat([powers, 1.5 * powers])
    assert is_fp8(torch.outer(scales, torch.tensor(NVFP4_M1.levels)))
    assert scales.max() / scales.min() == 1.5 * 2**OCTAVES
    for further in (scales.max() * 2, scales.min() / 2 * 1.5):  # one more octave on either side is one too many
        assert not is_fp8(further * torch.tensor(NVFP4_M1.levels))


@each_rule
@given(seed=st.integers(0, 10**6), size=sizes)
def test_a_rounded_weight_is_fp8_times_a_power_of_two_of_its_row(rule: ScaleRule, seed: int, size: int) -> None:
    weight = heavy_tailed(seed, size)
    scale = weight_scale(weight, NVFP4_M1, rule)
    assert is_one_mantissa_bit(scale.group)
    codes = to_codes(weight, scale.effective, NVFP4_M1)
    is_zero = group_amax(weight, NVFP4_M1) == 0  # whose scale of 1 multiplies nothing
    of_numbers = scale.group.masked_fill(is_zero, 0.0)
    alive = of_numbers.amax(-1) > 0
    rounded = from_codes(codes, scale.group, NVFP4_M1)[alive]
    assert is_fp8(rounded / base_of(of_numbers[alive]))
    stored = scale_to_bytes(scale.group, NVFP4_M1)
    check_scale_bytes(stored, NVFP4_M1, "here")
    assert torch.equal(scale_from_bytes(stored, NVFP4_M1), scale.group)


@each_rule
@given(seed=st.integers(0, 10**6), size=sizes, clip_ratio=clip_ratios)
def test_a_rounded_token_is_fp8_times_a_power_of_two_of_its_own(
    rule: ScaleRule, seed: int, size: int, clip_ratio: float | torch.Tensor
) -> None:
    rounded = quantize_activation(heavy_tailed(seed, size), NVFP4_M1, rule, clip_ratio)
    # A row's largest number is 0.5 … 6 times its scale, which is 1 or 1.5 times a power of two:
    # some base must do.
    exponents = torch.frexp(rounded.abs().amax(-1)).exponent
    for row, exponent in zip(rounded, exponents.tolist(), strict=True):
        bases = [2.0 ** (exponent - top) for top in range(4, 12)]
        assert any(is_fp8(row / base) for base in bases)


@each_rule
@given(seed=st.integers(0, 10**6), size=sizes, clip_ratio=clip_ratios)
def test_scales_have_one_mantissa_bit_and_lie_in_the_window_of_their_row(
    rule: ScaleRule, seed: int, size: int, clip_ratio: float | torch.Tensor
) -> None:
    amax = group_amax(heavy_tailed(seed, size), NVFP4_M1)
    scale = group_scale(amax, NVFP4_M1, rule, clip_ratio)
    assert is_one_mantissa_bit(scale)
    assert torch.equal(scale[amax == 0], torch.ones_like(scale[amax == 0]))
    of_numbers = scale.masked_fill(amax == 0, torch.nan).nan_to_num(nan=torch.inf).amin(-1)
    assert bool((scale.masked_fill(amax == 0, 0).amax(-1) <= 1.5 * of_numbers * 2.0**OCTAVES).all())
    assert torch.equal(group_scale(amax.double(), NVFP4_M1, rule, clip_ratio), scale.double())


def test_a_scale_is_the_nearest_of_the_grid() -> None:
    grid = torch.tensor([m * 2.0**e for e in range(-8, 9) for m in (1.0, 1.5) if m * 2.0**e <= E4M1_MAX])
    wanted = torch.logspace(-9, 9, 999, base=2.0)
    nearest = grid[(wanted.unsqueeze(1) - grid).abs().argmin(1)]
    amax = wanted.unsqueeze(1) * NVFP4_M1.top_level  # one group a row, so that no window is in the way
    assert torch.equal(group_scale(amax, NVFP4_M1, ScaleRule.CEIL).squeeze(1), nearest)


@each_rule
def test_a_group_far_below_its_row_gets_the_smallest_scale_of_the_window(rule: ScaleRule) -> None:
    amax = torch.tensor([[6 * 128.0, 6 * 2.0**-5, 6 * 2.0**-7, 0.0]])
    largest = 192.0 if rule is ScaleRule.LEAST_ERROR else 128.0  # what a candidate of 1.5 may ask for
    assert group_scale(amax, NVFP4_M1, rule).tolist() == [[128.0, largest / 2**OCTAVES, largest / 2**OCTAVES, 1.0]]


@each_rule
def test_a_row_sees_no_other_row(rule: ScaleRule) -> None:
    x = heavy_tailed(0, 0)
    rows = [quantize_activation(row, NVFP4_M1, rule) for row in x]
    assert torch.equal(quantize_activation(x, NVFP4_M1, rule), torch.stack(rows))
    weight = weight_scale(x, NVFP4_M1, rule).group
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    assert torch.equal(weight_scale(x[order], NVFP4_M1, rule).group, weight[order])


def stored_scales(*scales: float) -> torch.Tensor:
    return torch.tensor([scales]).to(torch.float8_e4m3fn).view(torch.uint8)


@pytest.mark.parametrize("mantissa", [1.125, 1.25, 1.375, 1.625, 1.75, 1.875])
def test_a_stored_scale_off_the_grid_is_refused(mantissa: float) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.0\.q holds a scale off the nvfp4_m1 grid"):
        check_scale_bytes(stored_scales(1.0, mantissa * 2), NVFP4_M1, "blocks.0.q")


@pytest.mark.parametrize("scale", [2.0**-9, 5 * 2.0**-9, 7 * 2.0**-9])
def test_a_stored_subnormal_that_is_not_of_the_grid_is_refused(scale: float) -> None:
    with pytest.raises(CheckpointError, match="nvfp4_m1 grid"):
        check_scale_bytes(stored_scales(scale), NVFP4_M1, "here")


@pytest.mark.parametrize(("low", "high"), itertools.product((1.0, 1.5), repeat=2))
def test_a_row_whose_scales_are_too_far_apart_is_refused_and_rows_do_not_add_up(low: float, high: float) -> None:
    smallest, largest = low * 2.0**-5, high * 2.0 ** (OCTAVES - 5)
    check_scale_bytes(stored_scales(smallest, 1.0, largest), NVFP4_M1, "here")
    check_scale_bytes(torch.cat([stored_scales(smallest / 2), stored_scales(largest)]), NVFP4_M1, "here")
    with pytest.raises(CheckpointError, match="nvfp4_m1 grid"):
        check_scale_bytes(stored_scales(smallest / 2, 1.0, largest), NVFP4_M1, "here")
