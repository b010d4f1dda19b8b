"""Laws of smoothing and of the low-rank branch."""

import pytest
import torch

from tempoquant.errors import RecipeError
from tempoquant.formats import FORMATS, MXFP4, NVFP4, Format, group_amax
from tempoquant.methods import fit_scale_range, smoothing_factor, svdquant
from tests.random_layers import random


@pytest.mark.parametrize("rank", [0, 1, 7, 48])
@pytest.mark.parametrize("smoothed", [False, True])
def test_branch_plus_residual_is_the_weight(rank: int, smoothed: bool) -> None:
    weight = random(48, 64)
    factor = random(64, seed=1).exp().to(torch.bfloat16) if smoothed else None
    branch, residual = svdquant(weight, factor, rank)
    rebuilt = residual if factor is None else residual / factor.float()
    rebuilt = rebuilt if branch is None else rebuilt + branch.product()
    torch.testing.assert_close(rebuilt, weight, rtol=1e-5, atol=1e-5)


def test_the_stored_branch_is_bfloat16_and_the_residual_knows_what_rounding_lost() -> None:
    branch, residual = svdquant(random(64, 64), None, 64)
    assert branch is not None and branch.up.dtype == branch.down.dtype == torch.bfloat16
    assert 0 < residual.abs().max() < 0.1  # a full-rank branch leaves its own rounding error, no more


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    with pytest.raises(RecipeError, match="rank 65"):
        svdquant(random(64, 128), None, 65)


def fitted(factor: torch.Tensor, amax: torch.Tensor, format: Format) -> torch.Tensor:
    """Fit as if every feature's root mean square were a third of its largest magnitude, in the only
    timestep bin.
    """
    return fit_scale_range(factor, amax, amax.unsqueeze(0) / 3, format)


def test_alpha_half_gives_input_and_weight_the_same_range() -> None:
    weight, amax = random(64, 32), random(32, seed=2).exp()
    factor = smoothing_factor(amax, weight.abs().amax(0), 0.5)
    torch.testing.assert_close(amax / factor, (weight * factor).abs().amax(0), rtol=2**-6, atol=0)


def test_alpha_zero_leaves_the_input_to_the_weight() -> None:
    weight, amax = random(64, 32), random(32, seed=2).exp()
    factor = smoothing_factor(amax, weight.abs().amax(0), 0.0)
    torch.testing.assert_close((weight * factor).abs().amax(0), torch.ones(32), rtol=2**-7, atol=0)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_dead_feature_has_a_finite_positive_factor(format: Format) -> None:
    weight, amax = random(64, 64), random(64, seed=2).exp()
    amax[3], weight[:, 5] = 0, 0
    factor = fitted(smoothing_factor(amax, weight.abs().amax(0), 0.5), amax, format)
    assert factor.dtype == torch.bfloat16
    assert bool((torch.isfinite(factor) & (factor > 0)).all())


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_nvfp4_activation_scales_stay_inside_e4m3_whatever_the_input_size(size: float) -> None:
    x, weight = random(200, 64, seed=3) * size, random(64, 64)
    amax = x.abs().amax(0)
    factor = fitted(smoothing_factor(amax, weight.abs().amax(0), 0.5), amax, NVFP4).float()
    scales = group_amax(x / factor, NVFP4) / NVFP4.top_level
    assert scales.max() <= 448 / 2 * 1.01  # room for a clip ratio of 2
    assert scales.min() > 2**-6  # a normal number


def test_the_free_gain_of_nvfp4_is_a_power_of_two() -> None:
    weight_amax, amax = random(64, 64).abs().amax(0), random(64, seed=2).exp()
    factor = smoothing_factor(amax, weight_amax, 0.5)
    of_nvfp4, of_mxfp4 = (fitted(factor, amax, format).float() for format in (NVFP4, MXFP4))
    ratio = of_nvfp4 / of_mxfp4
    assert torch.equal(ratio, ratio[0].expand(64))
    assert float(torch.frexp(ratio[0]).mantissa) == 0.5
