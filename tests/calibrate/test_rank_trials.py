"""The error reported for a rank equals that of the layer made at that rank."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from tempoquant import quantize_linear
from tempoquant.calibrate.phases import Phase
from tempoquant.calibrate.rank_trials import RankTrials, propagated_power
from tempoquant.recipe import Recipe

UNCENTRED = {"centring": False, "centring_by_bin": False}
OURS = Recipe.load("default").replace(rank=3, gptq=False, act_order=False)


def problem() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96).requires_grad_(False)
    return linear, torch.randn(200, 64) * torch.rand(64).exp() + 1


def errors_of(linear: nn.Linear, x: torch.Tensor, recipe: Recipe, gradient: torch.Tensor) -> Mapping[int, float]:
    trials = RankTrials({"it": linear}, recipe.default_format, recipe, (0, 3, 8))
    trials.observe(Phase.RANGE, x, 0)
    trials.end_phase(Phase.RANGE)
    return trials.errors([x], {"it": [gradient]}, [len(x)])["it"]


@pytest.mark.parametrize("changes", [{}, {"deflation": False}, {"deflation": False, **UNCENTRED}])
@torch.no_grad()
def test_the_error_at_each_rank_is_that_of_the_layer_quantized_at_it(changes: dict) -> None:
    recipe = OURS.replace(**changes)
    linear, x = problem()
    gradient = torch.zeros(200, 96)
    gradient[7] = torch.randn(96)  # one token is judged: what its outputs do together is all there is
    for rank, error in errors_of(linear, x, recipe, gradient).items():
        own = recipe.replace(rank=rank, deflation=recipe.deflation and rank > 0)
        difference = quantize_linear(linear.weight, linear.bias, x, own)(x) - linear(x)
        products = difference * gradient
        wanted = max(float(products.sum().square()), float(products.square().sum()))
        assert error == pytest.approx(wanted, rel=0.02)


@torch.no_grad()
def test_only_errors_that_are_judged_count() -> None:
    linear, x = problem()
    assert errors_of(linear, x, OURS, torch.zeros(200, 96))[3] == 0
    first = torch.zeros(200, 96)
    first[:50, ::2] = torch.randn(50, 48)
    assert errors_of(linear, x, OURS, first)[3] > 0
    assert errors_of(linear, x, OURS, 3 * first)[3] == pytest.approx(9 * errors_of(linear, x, OURS, first)[3])


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape) * 2.0 - 1


def test_independent_errors_move_by_the_sum_of_their_squares() -> None:
    torch.manual_seed(0)
    apart, whole = propagated_power(signs(500, 400), signs(500, 400), 500)
    assert apart == 500 * 400 and whole == pytest.approx(apart, rel=0.1)


def test_errors_that_tokens_have_in_common_add_up_over_them() -> None:
    torch.manual_seed(0)
    alike, gradient = signs(1, 400).expand(500, -1), torch.ones(500, 400)
    apart, whole = propagated_power(alike, gradient, 500)
    assert whole > 0.99 * 500**2 * 400 and apart == 500 * 400


def test_errors_that_outputs_have_in_common_add_up_over_them() -> None:
    torch.manual_seed(0)
    alike = signs(500, 1).expand(-1, 400)
    assert propagated_power(alike, torch.ones(500, 400), 500)[1] > 0.99 * 500 * 400**2


@pytest.mark.parametrize("common", [False, True])
def test_some_tokens_stand_for_the_others(common: bool) -> None:
    torch.manual_seed(0)
    error = signs(1, 4000).expand(400, -1) if common else signs(400, 4000)
    gradient = signs(1, 4000).expand(400, -1) if common else signs(400, 4000)
    of_all, of_some = propagated_power(error, gradient, 400)[1], propagated_power(error[::4], gradient[::4], 400)[1]
    assert of_some == pytest.approx(of_all, rel=0.15)
