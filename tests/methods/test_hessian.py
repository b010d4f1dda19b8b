"""Laws of the Hessian and of the feedback matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.errors import HessianError
from tempoquant.methods import HessianAccumulator, feedback_matrix
from tests.random_layers import random


def hard_hessian() -> torch.Tensor:
    """Make a Hessian (128, 128) float64 with eigenvalues from 1 to 1e−9: float32 makes some of them
    negative.
    """
    basis = torch.linalg.qr(random(128, 128, seed=3, dtype=torch.float64)).Q
    return basis * torch.logspace(0, -9, 128, dtype=torch.float64) @ basis.T


def test_the_hessian_does_not_depend_on_batching() -> None:
    x = random(2000, 64)
    whole, parts = HessianAccumulator(64), HessianAccumulator(64)
    whole.add(x)
    for part in x.reshape(8, 5, 50, 64):
        parts.add(part)
    assert parts.num_tokens == whole.num_tokens == 2000
    torch.testing.assert_close(parts.hessian, whole.hessian, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_features", [64, 1024, 1500])  # within a panel, a whole one, one and a part
def test_the_hessian_is_the_mean_square_to_float32(in_features: int) -> None:
    x = random(700, in_features)
    running = HessianAccumulator(in_features)
    running.add(x[:300]), running.add(x[300:])
    exact = x.double().T @ x.double() / 700
    # A sum of 700 products of unit size, each addition rounded to 2^−24 of the sum so far.
    torch.testing.assert_close(running.hessian.double(), exact, rtol=1e-5, atol=700**0.5 * 2**-22)


def test_the_hessian_is_symmetric_to_the_bit() -> None:
    running = HessianAccumulator(1500)
    running.add(random(40, 1500))
    assert torch.equal(running.hessian, running.hessian.T)


def test_taking_the_hessian_returns_it_and_starts_again() -> None:
    running = HessianAccumulator(64)
    running.add(random(100, 64))
    expected = running.hessian
    assert torch.equal(running.take(), expected)
    with pytest.raises(HessianError, match="no token"):
        running.take()
    running.add(random(100, 64))
    assert torch.equal(running.hessian, expected)


@pytest.mark.parametrize("in_features", [64, 1500])  # within a panel, one and a part
def test_an_order_is_that_of_a_hessian_whose_features_stand_in_it(in_features: int) -> None:
    x = random(2000, in_features)
    hessian, order = x.T @ x / len(x), torch.randperm(in_features, generator=torch.Generator().manual_seed(1))
    turned = hessian[order][:, order].contiguous()
    ordered = feedback_matrix(hessian.clone(), 0.01, order)
    assert ordered.order is order
    assert torch.equal(ordered.matrix, feedback_matrix(turned, 0.01).matrix)


def test_an_ordered_hessian_that_needs_float64_gets_it() -> None:
    hessian, order = hard_hessian().float(), torch.arange(128).flip(0)
    feedback = feedback_matrix(hessian.clone(), 0.0, order)
    assert feedback.needed_float64
    assert torch.equal(feedback.matrix, feedback_matrix(hessian.flip(0, 1).contiguous(), 0.0).matrix)


def test_a_hessian_without_tokens_is_an_error() -> None:
    with pytest.raises(HessianError, match="no token"):
        _ = HessianAccumulator(8).hessian


@pytest.mark.parametrize("in_features", [96, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_feedback_is_the_unit_upper_factor_of_the_damped_hessian(in_features: int, dtype: torch.dtype) -> None:
    x = random(2 * in_features, in_features, dtype=dtype)
    hessian = x.T @ x / len(x)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(in_features, dtype=dtype)).double()
    matrix = feedback_matrix(hessian.clone(), 0.01).matrix.double()
    assert torch.equal(matrix, matrix.triu()) and bool((matrix.diagonal() == 1).all())
    inverse = torch.linalg.inv(matrix)
    between = inverse @ damped @ inverse.T  # D² of H = M·D²·Mᵀ
    off_diagonal = between - between.diagonal().diag()
    assert off_diagonal.abs().max() < 200 * torch.finfo(dtype).eps * between.diagonal().max()


@given(seed=st.integers(0, 1000))
def test_features_that_are_always_zero_take_up_nothing_and_are_not_felt_by_damping(seed: int) -> None:
    x = random(60, 32, seed=seed, dtype=torch.float64)
    alive = torch.rand(32, generator=torch.Generator().manual_seed(seed)) < 0.7
    alive[0] = True
    x[:, ~alive] = 0
    matrix = feedback_matrix(x.T @ x, 0.01).matrix
    assert torch.equal(matrix[~alive], torch.eye(32, dtype=torch.float64)[~alive])
    assert torch.equal(matrix[:, ~alive], torch.eye(32, dtype=torch.float64)[:, ~alive])
    without = feedback_matrix(x[:, alive].T @ x[:, alive], 0.01).matrix
    torch.testing.assert_close(matrix[alive][:, alive], without)


def test_a_bad_hessian_raises_and_names_the_remedy() -> None:
    with pytest.raises(HessianError, match="more tokens, or raise damping_fraction"):
        feedback_matrix(-torch.eye(128), 0.01)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(HessianError, match="NaN or Inf"):
            feedback_matrix(torch.full((128, 128), bad), 0.01)


def test_a_hessian_that_only_float64_can_factor_is_retried_and_reported() -> None:
    hard = hard_hessian().float()
    in_float64 = feedback_matrix(hard.double(), 1e-6)
    result = feedback_matrix(hard.clone(), 1e-12)
    assert result.needed_float64 and result.matrix.dtype == torch.float32
    assert not in_float64.needed_float64
    assert not feedback_matrix(hard.clone(), 0.01).needed_float64


def test_the_retry_in_float64_sees_the_hessian_as_it_was() -> None:
    """The failed factorization overwrites its memory; several panels, so that it fails after some
    are finished.
    """
    hessian = torch.eye(1500) * 2 + 0.1 * random(1500, 1500).square().clamp(max=1) / 1500
    hessian = (hessian + hessian.T) / 2
    hessian[:2, :2] = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # the last to be reached; singular to float32
    hessian[:2, 2:] = hessian[2:, :2] = 0
    hessian[1, 1] += 2**-23
    wanted = feedback_matrix(hessian.double(), 0.0).matrix
    result = feedback_matrix(hessian.clone(), 0.0)
    assert result.needed_float64
    torch.testing.assert_close(result.matrix.double(), wanted, rtol=1e-5, atol=1e-7)
