"""Laws of deflation: nothing is lost by dividing input and weight, and what four bits get is as
small as it can be.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempoquant.errors import RecipeError
from tempoquant.methods import Deflation, deflation, deflation_of, split_weight
from tests.random_layers import random

BFLOAT16_UNIT = 2.0**-8  # the largest relative error of rounding to it
IN, OUT, RANK = 96, 64, 8


def inputs(in_features: int = IN, num_tokens: int = 800, seed: int = 0) -> torch.Tensor:
    """Make raw inputs whose features are correlated, some of them far larger than the rest."""
    mixing = torch.eye(in_features) + random(in_features, in_features, seed=seed + 1) / in_features**0.5
    mixing *= random(in_features, seed=seed + 2).exp()
    return random(num_tokens, in_features, seed=seed) @ mixing


class Problem:
    """A smoothed weight, inputs raw and smoothed, and what deflation makes of them."""

    def __init__(self, seed: int = 0, rank: int = RANK, smoothed: bool = True) -> None:
        self.raw = inputs(seed=seed)
        self.factor = random(IN, seed=seed + 3).exp().bfloat16() if smoothed else None
        factor = torch.ones(IN) if self.factor is None else self.factor.float()
        self.x, self.weight = self.raw / factor, random(OUT, IN, seed=seed + 4) * factor
        self.shared = deflation_of(covariance_of(self.x), [self.weight], self.factor, rank)
        self.up, self.residual = split_weight(self.weight, self.factor, self.shared)
        self.hidden = self.raw.double() @ self.shared.down.double().T
        self.left = (self.raw.double() / factor.double()) - self.hidden @ self.shared.deflation.double().T


def covariance_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, OUT), smoothed=st.booleans())
def test_branch_and_residual_make_the_product_but_for_the_rounding_of_up(seed: int, rank: int, smoothed: bool) -> None:
    problem = Problem(seed, rank, smoothed)
    factor = 1.0 if problem.factor is None else problem.factor.double()
    wanted = (problem.raw.double() / factor) @ problem.weight.double().T
    found = problem.left @ problem.residual.double().T + problem.hidden @ problem.up.double().T
    of_up = problem.hidden.abs() @ (problem.up.double().abs() * BFLOAT16_UNIT * (1 + 2 * BFLOAT16_UNIT)).T
    # The residual and up itself are made in float32, by sums of `rank` and IN terms.
    of_float32 = (
        (rank + IN) * 2.0**-23 * (problem.raw.double() / factor).norm(dim=1, keepdim=True) * problem.weight.norm()
    )
    assert bool(((found - wanted).abs() <= of_up + of_float32).all())


def test_a_full_rank_leaves_nothing_for_four_bits() -> None:
    x, weight = inputs(48), random(OUT, 48, seed=9)
    shared = deflation_of(covariance_of(x), [weight], None, 48)
    up, residual = split_weight(weight, None, shared)
    assert residual.norm() < 1e-5 * weight.norm()
    left = x - x @ shared.down.float().T @ shared.deflation.float().T
    assert left.norm() < 48**0.5 * BFLOAT16_UNIT * x.norm()
    in_16_bits, wanted = x @ shared.down.float().T @ up.float().T, x @ weight.T
    assert (in_16_bits - wanted).norm() < BFLOAT16_UNIT * wanted.norm()


@pytest.mark.parametrize("smoothed", [False, True])
def test_inputs_of_as_few_directions_as_the_rank_are_taken_out_whole(smoothed: bool) -> None:
    factor = random(IN, seed=3).exp().bfloat16() if smoothed else None
    scale = torch.ones(IN) if factor is None else factor.float()
    x = random(500, RANK) @ random(RANK, IN, seed=1)
    shared = deflation_of(covariance_of(x), [0.1 * random(OUT, IN, seed=2)], factor, RANK)
    left = x.double() - (x * scale).double() @ shared.down.double().T @ shared.deflation.double().T
    assert left.norm() < RANK**0.5 * BFLOAT16_UNIT * x.norm()


def test_what_is_left_of_the_input_is_the_least_that_a_regression_on_the_branch_leaves() -> None:
    problem = Problem()
    x = problem.x.double()
    best = x - problem.hidden @ torch.linalg.lstsq(problem.hidden, x).solution
    of_rounding = (problem.hidden.abs() @ problem.shared.deflation.double().abs().T * BFLOAT16_UNIT).square().sum()
    assert best.square().sum() <= problem.left.square().sum() <= best.square().sum() + of_rounding
    assert best.square().sum() < 0.8 * x.square().sum()


def test_what_is_left_of_the_weight_is_orthogonal_to_what_the_branch_reads() -> None:
    problem = Problem()
    stored = problem.shared.down.float() * problem.factor.float()
    assert (problem.residual @ stored.T).abs().max() < 1e-4 * problem.weight.norm()


def test_the_directions_are_the_leading_ones_of_input_and_weight_together() -> None:
    x, weights = inputs(), [random(OUT, IN, seed=4), 3 * random(20, IN, seed=5)]
    covariance = covariance_of(x)
    shared = deflation_of(covariance, weights, None, RANK)
    gram = torch.cat(weights).double().T @ torch.cat(weights).double()
    together = covariance.double() / covariance.double().trace() + gram / gram.trace()
    basis = torch.linalg.qr(shared.down.double().T).Q
    most = torch.linalg.eigvalsh(together)[-RANK:].sum()
    assert most * (1 - 2.0**-10) <= (basis.T @ together @ basis).trace() <= most * (1 + 1e-12)


def test_linears_that_share_an_input_share_what_one_of_all_their_rows_would_get() -> None:
    x, weights = inputs(), [random(OUT, IN, seed=4), 3 * random(20, IN, seed=5)]
    apart = deflation_of(covariance_of(x), weights, None, RANK)
    stacked = deflation_of(covariance_of(x), [torch.cat(weights)], None, RANK)
    for one, other in zip(apart, stacked, strict=True):  # sums in another order may round to another neighbour
        torch.testing.assert_close(one.float(), other.float(), rtol=2 * BFLOAT16_UNIT, atol=1e-3)
    up, residual = split_weight(torch.cat(weights), None, apart)
    parts = [split_weight(weight, None, apart) for weight in weights]
    torch.testing.assert_close(torch.cat([part for _, part in parts]), residual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([part for part, _ in parts]).float(), up.float(), rtol=2 * BFLOAT16_UNIT, atol=1e-4
    )


def test_how_large_input_and_weight_are_changes_no_direction() -> None:
    covariance, weight = covariance_of(inputs()), random(OUT, IN, seed=4)
    one, other = (deflation_of(covariance * 4.0**k, [weight * 2.0**-k], None, RANK) for k in (0, 9))
    torch.testing.assert_close(one.down.float(), other.down.float(), rtol=2 * BFLOAT16_UNIT, atol=1e-3)
    torch.testing.assert_close(one.deflation.float(), other.deflation.float(), rtol=2 * BFLOAT16_UNIT, atol=1e-2)


def wide(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a covariance and a weight of 1100 features with a few dominant directions, each by
    another amount.
    """
    basis = torch.linalg.qr(random(1100, 1100, seed=seed)).Q
    spectrum = 0.98 ** torch.arange(1100.0)
    spectrum[:6] += torch.tensor([200.0, 150.0, 110.0, 80.0, 55.0, 35.0])
    return basis * spectrum @ basis.T, random(50, 1100, seed=seed + 1) / 30


def test_the_randomized_directions_of_a_wide_layer_are_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    covariance, weight = wide()
    randomized = deflation_of(covariance, [weight], None, 4)
    monkeypatch.setattr(deflation, "EXACT_UP_TO", 2000)
    exact = deflation_of(covariance, [weight], None, 4)
    assert exact.down.shape == (4, 1100) and exact.deflation.shape == (1100, 4)
    for one, other in zip(randomized, exact, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2 * BFLOAT16_UNIT, atol=1e-4)


@pytest.mark.parametrize("size", [IN, 1100], ids=["exact", "randomized"])
def test_signs_are_fixed_and_the_random_numbers_of_others_left_alone(size: int) -> None:
    covariance, weight = (covariance_of(inputs()), random(OUT, IN)) if size == IN else wide()
    before = covariance.clone()
    torch.manual_seed(1)
    first = deflation_of(covariance, [weight], None, 4)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = deflation_of(covariance, [weight], None, 4)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.down, second.down) and torch.equal(first.deflation, second.deflation)
    assert bool((first.down.gather(1, first.down.abs().argmax(1, keepdim=True)) > 0).all())
    assert torch.equal(covariance, before)


@pytest.mark.parametrize("nothing", ["input", "weight", "both"])
def test_an_input_or_a_weight_of_zeros_makes_finite_numbers(nothing: str) -> None:
    covariance = covariance_of(inputs()) * (nothing == "weight")
    weight = random(OUT, IN) * (nothing == "input")
    shared = deflation_of(covariance, [weight], None, RANK)
    up, residual = split_weight(weight, None, shared)
    for tensor in (*shared, up, residual):
        assert bool(torch.isfinite(tensor).all())


def test_what_is_stored_is_contiguous_bfloat16() -> None:
    problem = Problem()
    assert isinstance(problem.shared, Deflation)
    for tensor in (*problem.shared, problem.up):
        assert tensor.dtype == torch.bfloat16 and tensor.is_contiguous()


@pytest.mark.parametrize("rank", [21, 97])
def test_a_rank_above_the_smaller_side_of_a_weight_is_refused(rank: int) -> None:
    with pytest.raises(RecipeError, match=rf"rank {rank} exceeds .*\(20, 96\)"):
        deflation_of(torch.eye(IN), [random(20, IN), random(OUT, IN)], None, rank)
