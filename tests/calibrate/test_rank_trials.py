"""What a rank is said to leave is what the layer made at that rank leaves."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from tempoquant import quantize_linear
from tempoquant.calibrate.linear_calibration import Phase
from tempoquant.calibrate.rank_trials import RankTrials
from tempoquant.recipe import Recipe

OURS = Recipe.load("default").replace(rank=3, gptq=False)


def problem() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96).requires_grad_(False)
    return linear, torch.randn(200, 64) * torch.rand(64).exp() + 1


def errors_of(linear: nn.Linear, x: torch.Tensor, recipe: Recipe, worth: torch.Tensor) -> Mapping[int, float]:
    trials = RankTrials({"it": linear}, recipe.default_format, recipe, (0, 3, 8))
    trials.observe(Phase.RANGE, x, 0)
    trials.settle(Phase.RANGE)
    return trials.errors(x, {"it": worth})["it"]


@pytest.mark.parametrize("changes", [{}, {"deflation": False}, {"deflation": False, "centring": False}])
@torch.no_grad()
def test_the_error_at_each_rank_is_that_of_the_layer_quantized_at_it(changes: dict) -> None:
    recipe = OURS.replace(**changes)
    linear, x = problem()
    found = errors_of(linear, x, recipe, torch.ones(200, 96))
    for rank, error in found.items():
        own = recipe.replace(rank=rank, deflation=recipe.deflation and rank > 0)
        layer = quantize_linear(linear.weight, linear.bias, x, own)
        assert error == pytest.approx(float((layer(x) - linear(x)).square().sum()), rel=0.02)


@torch.no_grad()
def test_only_errors_of_worth_count() -> None:
    linear, x = problem()
    first, second = torch.zeros(200, 96), torch.zeros(200, 96)
    first[:50, ::2], second[50:, 1::2] = 1, 2
    one, other, both = (errors_of(linear, x, OURS, worth)[3] for worth in (first, second, first + second))
    assert both == pytest.approx(one + other, rel=1e-6)
    assert errors_of(linear, x, OURS, torch.zeros(200, 96))[3] == 0
