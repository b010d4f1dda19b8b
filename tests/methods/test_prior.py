"""Laws of the prior: what it costs at most, what it bounds, and that it looks the same in every
basis.
"""

import pytest
import torch

from tempoquant.formats import rotate
from tempoquant.methods import add_prior_, shrunk_mean
from tempoquant.methods.prior import prior_energy, share, typical_energy
from tests.random_layers import random

WIDTH = 64


SPREADS = {
    "all alike": torch.ones(WIDTH, dtype=torch.float64),
    "many orders of magnitude": torch.logspace(-12, 6, WIDTH, dtype=torch.float64),
    "one loud": torch.where(torch.arange(WIDTH) == 7, 2.5e7, 1.0).double(),
    "one in ten alive": (torch.arange(WIDTH) % 10 == 0).double(),
}


@pytest.mark.parametrize("variance", SPREADS.values(), ids=SPREADS)
@pytest.mark.parametrize("fraction", [0.01, 0.125, 0.5])
def test_the_sum_of_root_mean_squares_grows_by_the_root_of_the_fraction_at_most(
    variance: torch.Tensor, fraction: float
) -> None:
    """Balanced smoothing leaves an error in proportion to that sum, squared, so this is all the
    prior can cost.
    """
    mixed = (1 - fraction) * variance + fraction * typical_energy(variance, variance, 1e9)
    assert mixed.sqrt().sum() <= (1 + fraction**0.5) * variance.sqrt().sum() * (1 + 1e-6)


def test_the_mean_of_a_constant_counts_in_the_priors_energy_and_that_of_a_feature_that_moves_hardly() -> None:
    variance = torch.ones(WIDTH, dtype=torch.float64)
    variance[:3] = 1e-9
    means = torch.tensor([0.0, 2.0, 1000.0, 2.0]).double()
    about_zero = variance.clone()
    about_zero[:4] += means.square()
    energy = prior_energy(variance, about_zero, 1e9) / typical_energy(variance, about_zero, 1e9)
    torch.testing.assert_close(energy[:3], torch.tensor([1.0, 5.4, 17.0]).double(), rtol=0.05, atol=0)
    assert energy[3] < 1.1


def test_without_a_fraction_there_is_no_prior_however_few_the_tokens() -> None:
    assert share(0.0, 1) == 0 and share(0.125, 0) == 1 and share(0.125, 1e12) == pytest.approx(0.125)
    moments = random(WIDTH, WIDTH).double()
    assert torch.equal(add_prior_(moments.clone(), torch.ones(WIDTH).double(), 0.0, True), moments)


def test_rotated_moments_with_a_prior_are_those_of_the_prior_rotated() -> None:
    """Mixing before the rotation and after it is the same."""
    x, energy = random(500, WIDTH).double(), random(WIDTH, seed=1).double().exp()
    plain, turned = x.T @ x / 500, rotate(x).T @ rotate(x) / 500
    wanted = rotate(rotate(add_prior_(plain, energy, 0.25)).mT).mT
    torch.testing.assert_close(add_prior_(turned, energy, 0.25, rotated=True), wanted)


def test_a_mean_is_believed_as_far_as_it_is_above_its_own_error() -> None:
    variance = torch.ones(1, WIDTH).double()
    for size, count, low, high in (
        (0.01, 100, 0.0, 0.1),
        (1.0, 1, 0.0, 0.25),
        (1.0, 8, 0.9, 1),
        (3.0, 100, 0.9999, 1),
    ):
        mean = torch.full((1, WIDTH), size).double()
        believed = shrunk_mean(mean, variance if count > 1 else 0 * variance, torch.tensor([[count]]).double()) / mean
        assert low <= float(believed[0, 0]) <= high
