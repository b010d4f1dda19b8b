"""Laws of smoothing by root mean squares; by largest magnitudes it is in test_svdquant.py, with the
branch.
"""

import pytest
import torch

from tempoquant.formats import FORMATS, INT4, MXFP4, Format
from tempoquant.methods import fit_scale_range, smoothing_factor
from tests.random_layers import random


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(0).sqrt()


X = random(500, 64, seed=1) * random(64, seed=2).exp()
WEIGHT = random(96, 64) * random(64, seed=3).exp()


def by_rms(x: torch.Tensor, weight: torch.Tensor, alpha: float, format: Format) -> torch.Tensor:
    factor = smoothing_factor(rms(x), rms(weight), alpha)
    return fit_scale_range(factor, x.abs().amax(0), rms(x).unsqueeze(0), format).float()


@pytest.mark.parametrize("format", [MXFP4, INT4], ids=["mxfp4", "int4"])
def test_alpha_half_gives_every_feature_the_same_energy_in_input_and_weight(format: Format) -> None:
    factor = by_rms(X, WEIGHT, 0.5, format)
    # The factor is a bfloat16, rounded by 2^−8 at most; its ratio is felt twice.
    torch.testing.assert_close(rms(X / factor), rms(WEIGHT * factor), rtol=2**-7 * 1.1, atol=0)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_alpha_half_makes_the_ratio_of_energies_the_same_power_of_two_for_all_features(format: Format) -> None:
    """Formats whose activation scales have a limited range take a common factor besides."""
    factor = by_rms(X, WEIGHT, 0.5, format)
    ratio = rms(X / factor) / rms(WEIGHT * factor)
    nearest = 2.0 ** ratio.log2().mean().round()
    torch.testing.assert_close(ratio, nearest.expand(64), rtol=2**-7 * 1.1, atol=0)


def test_alpha_zero_and_one_leave_one_side_alike() -> None:
    torch.testing.assert_close(rms(X / by_rms(X, WEIGHT, 1.0, MXFP4)), torch.ones(64), rtol=2**-8 * 1.1, atol=0)
    torch.testing.assert_close(rms(WEIGHT * by_rms(X, WEIGHT, 0.0, MXFP4)), torch.ones(64), rtol=2**-8 * 1.1, atol=0)


def test_one_extreme_token_decides_by_amax_and_not_by_rms() -> None:
    spiked = X.clone()
    spiked[7, 5] = 100 * X[:, 5].abs().max()
    amaxes = [smoothing_factor(x.abs().amax(0), WEIGHT.abs().amax(0), 0.5)[5] for x in (X, spiked)]
    rmses = [by_rms(x, WEIGHT, 0.5, MXFP4)[5] for x in (X, spiked)]
    assert amaxes[1] / amaxes[0] == pytest.approx(10, rel=0.01)
    assert rmses[1] / rmses[0] < 5


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_feature_that_is_zero_everywhere_has_a_finite_positive_factor(format: Format) -> None:
    x, weight = X.clone(), WEIGHT.clone()
    x[:, 3], weight[:, 5] = 0, 0
    factor = by_rms(x, weight, 0.5, format)
    assert bool((torch.isfinite(factor) & (factor > 0)).all())
    if not format.has_tensor_scale:
        assert factor[3] == factor[5] == 1


E4M3 = [format for format in FORMATS.values() if format.has_tensor_scale]
each_e4m3 = pytest.mark.parametrize("format", E4M3, ids=lambda format: format.name)


@each_e4m3
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_a_token_far_louder_or_quieter_than_calibrations_keeps_its_scales(size: float, format: Format) -> None:
    factor = by_rms(X * size, WEIGHT, 0.5, format)
    scales = X.mul(size).div(factor).unflatten(-1, (-1, 16)).abs().amax(-1) / 6
    assert scales.max() * 40 < 448 and scales.median() / 16 > 2**-6


@each_e4m3
def test_a_quiet_timestep_bin_and_a_loud_one_both_fit(format: Format) -> None:
    by_bin = torch.stack([rms(X) / 100, rms(X) * 3])
    factor = fit_scale_range(smoothing_factor(by_bin[1], rms(WEIGHT), 0.5), 3 * X.abs().amax(0), by_bin, format).float()
    quiet, loud = ((X * size / factor).unflatten(-1, (-1, 16)).abs().amax(-1) / 6 for size in (0.01, 3))
    assert loud.max() < 448 / 2 * 1.01 and quiet.median() > 2**-6


@each_e4m3
def test_the_loudest_token_of_calibration_fits_before_the_quietest_does(format: Format) -> None:
    by_bin = torch.stack([rms(X) * 1e-6, rms(X)])
    factor = fit_scale_range(smoothing_factor(by_bin[1], rms(WEIGHT), 0.5), X.abs().amax(0), by_bin, format).float()
    assert 448 / 4 * 0.99 < (X / factor).abs().max() / 6 < 448 / 2 * 1.01  # with room for a clip ratio of 2


def test_the_prior_bounds_what_a_column_of_hardly_any_weight_is_multiplied_by() -> None:
    columns = rms(WEIGHT)
    columns[5] = 1e-9
    plain, bounded = (smoothing_factor(rms(X), columns, 0.5, fraction) for fraction in (0.0, 0.125))
    assert plain[5] > 1000 * plain.median() and bounded[5] < 10 * bounded.median()
