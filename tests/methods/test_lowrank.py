"""Laws of the truncated SVD, exact for small matrices and randomized for large ones."""

import pytest
import torch

from tempoquant.methods import truncated_svd
from tests.random_layers import random


def with_outliers(out_features: int, in_features: int) -> torch.Tensor:
    """Make a weight as smoothing leaves it: some columns and some rows far larger than the rest."""
    weight = random(out_features, in_features)
    weight[:, ::97] *= 12
    weight[::211] *= 6
    return weight


def least_squared_error(weight: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(weight)[rank:].double().square().sum())


def squared_error(weight: torch.Tensor, rank: int) -> float:
    up, down = truncated_svd(weight, rank)
    return float((weight - up @ down).double().square().sum())


def test_a_small_matrix_gets_the_best_of_its_rank() -> None:
    weight = random(40, 60)
    assert squared_error(weight, 5) == pytest.approx(least_squared_error(weight, 5), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("shape", [(1100, 1100), (1600, 1100), (1100, 1600)])
@pytest.mark.parametrize("make", [random, with_outliers])
def test_a_large_matrix_gets_the_best_of_its_rank_to_a_thousandth_of_the_error(make, shape, rank: int) -> None:
    weight = make(*shape)  # without outliers the spectrum is flat, the hardest there is
    assert squared_error(weight, rank) < 1.001 * least_squared_error(weight, rank)


def test_a_large_matrix_of_low_rank_is_recovered() -> None:
    weight = random(1500, 16) @ random(16, 1200, seed=1)
    up, down = truncated_svd(weight, 16)
    torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-5 * float(weight.abs().max()))


def test_singular_values_far_apart_stay_in_range() -> None:
    """Powers of them, as subspace iteration without orthogonalization makes, would not."""
    u, v = (torch.linalg.qr(random(1200, 4, seed=seed)).Q for seed in (0, 1))
    weight = u * torch.tensor([1e12, 1e4, 1.0, 1e-4]) @ v.T
    up, down = truncated_svd(weight, 1)
    torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-5 * float(weight.abs().max()))


@pytest.mark.parametrize("shape", [(40, 60), (1100, 1300)], ids=["exact", "randomized"])
def test_factors_share_the_singular_values_and_their_sign_is_fixed(shape: tuple[int, int]) -> None:
    up, down = truncated_svd(random(*shape), 5)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    assert bool((up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all())


def test_the_result_neither_reads_nor_moves_the_random_numbers_of_others() -> None:
    weight = random(1100, 1100)
    torch.manual_seed(1)
    first = truncated_svd(weight, 4)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = truncated_svd(weight, 4)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_almost_full_rank_of_a_large_matrix_is_exact() -> None:
    weight = random(1030, 1030)
    assert squared_error(weight, 1030) < 1e-6 * float(weight.square().sum())
