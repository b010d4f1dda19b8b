"""Laws of the clip search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.formats import FORMATS, MXFP4, NVFP4, Format, ScaleRule, quantize_activation
from tempoquant.methods import best_clip_ratio, clip_errors
from tests.random_layers import random

CANDIDATES = (0.6, 0.8, 1.0, 1.2)


def errors(x: torch.Tensor, residual: torch.Tensor | None = None, format: Format = NVFP4) -> torch.Tensor:
    return clip_errors(x, random(48, 64, seed=9) if residual is None else residual, format, ScaleRule.CEIL, CANDIDATES)


def test_clip_ratio_one_wins_without_error_on_inputs_already_on_the_grid() -> None:
    measured = errors(quantize_activation(random(50, 64), NVFP4, ScaleRule.CEIL))
    assert measured[CANDIDATES.index(1.0)] == 0
    assert best_clip_ratio(measured[None], CANDIDATES).tolist() == [1.0]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_the_error_is_that_of_the_output_and_the_choice_its_least(format: Format) -> None:
    x, residual = random(300, 64).pow(3), random(48, 64, seed=9)
    wanted = [
        float(((quantize_activation(x, format, ScaleRule.CEIL, c) - x).double() @ residual.double().T).square().sum())
        for c in CANDIDATES
    ]
    measured = errors(x, residual, format)
    assert measured.dtype == torch.float64
    assert measured.tolist() == pytest.approx(wanted, rel=1e-5)
    best = best_clip_ratio(measured[None], CANDIDATES)
    assert best.tolist() == pytest.approx([CANDIDATES[wanted.index(min(wanted))]])


@given(seed=st.integers(0, 1000))
def test_errors_add_over_tokens_and_over_linears_that_share_the_input(seed: int) -> None:
    x, residual = random(90, 64, seed=seed), random(48, 64, seed=seed + 1)
    whole = errors(x, residual, MXFP4)
    torch.testing.assert_close(errors(x[:20], residual, MXFP4) + errors(x[20:], residual, MXFP4), whole)
    torch.testing.assert_close(errors(x, residual[:30], MXFP4) + errors(x, residual[30:], MXFP4), whole)


def test_more_tokens_than_are_held_at_once_are_all_counted() -> None:
    x = random(9000, 64)
    parts = sum(errors(part) for part in x.split(1000))
    torch.testing.assert_close(errors(x), parts, rtol=1e-5, atol=0)


def test_measuring_leaves_its_arguments_alone() -> None:
    x, residual = random(50, 64), random(48, 64, seed=9)
    before = x.clone(), residual.clone()
    errors(x, residual)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_bins_are_chosen_apart_and_the_first_minimum_wins() -> None:
    table = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0]], dtype=torch.float64)
    assert torch.equal(best_clip_ratio(table, CANDIDATES), torch.tensor([0.8, 0.6, 1.2]))
