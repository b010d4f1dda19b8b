"""Laws of the clip search."""

import pytest
import torch

from tempoquant.errors import CalibrationError
from tempoquant.formats import MXFP4, NVFP4, ScaleRule, quantize_activation
from tempoquant.methods import ClipSearch

CANDIDATES = (0.6, 0.8, 1.0, 1.2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def search(num_bins: int = 1, max_tokens: int = 4096, format=NVFP4) -> ClipSearch:
    return ClipSearch(random(48, 64, seed=9), format, ScaleRule.CEIL, CANDIDATES, num_bins, max_tokens)


def test_clip_ratio_one_wins_on_inputs_already_on_the_grid() -> None:
    running = search()
    running.add(quantize_activation(random(50, 64), NVFP4, ScaleRule.CEIL), 0)
    assert running.best().tolist() == [1.0]
    assert running.squared_error[0, CANDIDATES.index(1.0)] == 0


def test_the_choice_is_the_one_of_least_output_error() -> None:
    x, residual = random(300, 64).pow(3), random(48, 64, seed=9)
    running = search()
    running.add(x, 0)
    errors = [
        float(((quantize_activation(x, NVFP4, ScaleRule.CEIL, c) - x) @ residual.T).square().sum()) for c in CANDIDATES
    ]
    assert running.best().tolist() == pytest.approx([CANDIDATES[errors.index(min(errors))]])
    assert running.squared_error[0].tolist() == pytest.approx(errors, rel=1e-5)


def test_bins_are_searched_apart() -> None:
    grid = quantize_activation(random(50, 64), NVFP4, ScaleRule.CEIL)
    running = search(num_bins=2)
    running.add(grid, 0)
    running.add(grid / 1.2 * 1.0001, 1)
    alone = search()
    alone.add(grid, 0)
    assert running.best()[0] == alone.best()[0]
    assert running.num_tokens == [50, 50]


def test_the_first_minimum_wins() -> None:
    running = search()
    running.add(torch.zeros(4, 64), 0)  # every candidate is perfect on zeros
    assert running.best().tolist() == pytest.approx([CANDIDATES[0]])


def test_calls_may_come_in_any_grouping() -> None:
    x = random(9000, 64)
    whole, parts = search(max_tokens=10_000), search()
    whole.add(x, 0)
    for part in x.split(1000):
        parts.add(part, 0)
    torch.testing.assert_close(whole.best(), parts.best())
    torch.testing.assert_close(whole.squared_error, parts.squared_error, rtol=1e-5, atol=0)


def test_one_call_gives_at_most_max_tokens_evenly_spaced() -> None:
    running = search(max_tokens=3)
    x = random(7, 64)
    running.add(x, 0)
    assert running.num_tokens == [3]
    expected = search()
    expected.add(x[[0, 3, 6]], 0)
    expected.best(), running.best()
    torch.testing.assert_close(running.squared_error, expected.squared_error)


def test_a_bin_without_tokens_is_an_error_and_not_a_guess() -> None:
    running = search(num_bins=2, format=MXFP4)
    running.add(random(4, 64), 0)
    with pytest.raises(CalibrationError, match="bin 1 of 2"):
        running.best()
