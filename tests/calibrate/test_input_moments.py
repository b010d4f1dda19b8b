"""Laws of InputMoments: they are those of all tokens together, however these came and however far
from zero.
"""

import itertools

import pytest
import torch

from tempoquant.calibrate.input_moments import InputMoments
from tempoquant.errors import HessianError

NUM_TOKENS, WIDTH = 600, 24
FLOAT32_UNIT = 2.0**-24
BATCHES = {"at once": [600], "equal": [200] * 3, "uneven": [7, 400, 1, 192], "one by one": [1] * 600}
MEANS = {"none": 0.0, "a few": 5.0, "huge": 1000.0}
each_batching = pytest.mark.parametrize("sizes", BATCHES.values(), ids=BATCHES)
each_mean = pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS)


def tokens(mean: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator)
    x = torch.randn(NUM_TOKENS, WIDTH, generator=generator) @ mixing
    return x + mean * torch.randn(WIDTH, generator=generator).sign()


def moments(x: torch.Tensor, sizes: list[int], centred: bool) -> InputMoments:
    gathered = InputMoments(x.shape[1], centred=centred, with_covariance=True)
    for part in x.split(sizes):
        gathered.add(part, torch.stack(torch.aminmax(part, dim=0)).float())
    return gathered


@each_batching
@each_mean
def test_about_the_mean_they_are_as_exact_as_the_tokens_spread_and_not_as_their_size(
    sizes: list[int], mean: float
) -> None:
    x = tokens(mean)
    exact = x.double() - x.double().mean(0)
    covariance = exact.T @ exact / NUM_TOKENS
    found = moments(x, sizes, centred=True)
    unit = 2 * FLOAT32_UNIT * max(1.0, mean)  # the mean is a float32, and so is the largest distance from it
    torch.testing.assert_close(found.means[0].double(), x.double().mean(0), rtol=0, atol=2 * unit)
    torch.testing.assert_close(found.amax.double(), exact.abs().amax(0), rtol=1e-6, atol=4 * unit)
    torch.testing.assert_close(found.rms.double(), covariance.diagonal().sqrt(), rtol=1e-5, atol=0)
    largest = float(covariance.diagonal().max())
    torch.testing.assert_close(found.take_covariance(None).double(), covariance, rtol=0, atol=1e-4 * largest)


@each_batching
@each_mean
def test_about_zero_they_are_those_of_the_numbers_themselves(sizes: list[int], mean: float) -> None:
    x = tokens(mean)
    exact = x.double().T @ x.double() / NUM_TOKENS
    found = moments(x, sizes, centred=False)
    assert torch.equal(found.means, torch.zeros(1, WIDTH)) and torch.equal(found.amax, x.abs().amax(0))
    torch.testing.assert_close(found.rms.double(), exact.diagonal().sqrt(), rtol=1e-6, atol=0)
    largest = float(exact.diagonal().max())
    torch.testing.assert_close(
        found.take_covariance(None).double(), exact, rtol=0, atol=NUM_TOKENS * FLOAT32_UNIT * largest
    )


@each_mean
def test_shifting_the_input_shifts_the_mean_alone(mean: float) -> None:
    x = tokens(0.0)
    shift = mean * torch.randint(-1, 2, (WIDTH,), generator=torch.Generator().manual_seed(3))
    one, other = moments(x, [300, 300], True), moments(x + shift, [300, 300], True)
    rounding = 8 * FLOAT32_UNIT * max(1.0, mean)  # of every token, when the shift is added
    torch.testing.assert_close(other.means, one.means + shift, rtol=0, atol=rounding)
    torch.testing.assert_close(other.amax, one.amax, rtol=0, atol=rounding)
    torch.testing.assert_close(other.rms, one.rms, rtol=0, atol=rounding)
    torch.testing.assert_close(other.take_covariance(None), one.take_covariance(None), rtol=0, atol=1e-4 + rounding)


def test_a_feature_that_hardly_moves_far_from_zero_has_the_range_it_has() -> None:
    x = torch.full((NUM_TOKENS, 2), 1000.0625)
    x[5, 1] += 2.0**-10
    found = moments(x, [100] * 6, centred=True)
    assert found.amax[0] == found.rms[0] == 0
    torch.testing.assert_close(found.rms[1].double(), x[:, 1].double().std(correction=0), rtol=1e-5, atol=0)


def test_the_covariance_is_that_of_the_smoothed_input() -> None:
    x, factor = tokens(5.0), torch.rand(WIDTH, generator=torch.Generator().manual_seed(1)).add(0.5).bfloat16()
    for centred in (False, True):
        raw = moments(x, [600], centred).take_covariance(None)
        wanted = raw / factor.float() / factor.float().unsqueeze(1)
        torch.testing.assert_close(moments(x, [600], centred).take_covariance(factor), wanted, rtol=1e-5, atol=0)


def test_half_precision_tokens_are_summed_in_more() -> None:
    x = tokens(30.0).bfloat16()
    for centred, dtype in itertools.product((False, True), (torch.bfloat16, torch.float16)):
        found, wanted = moments(x.to(dtype), [200] * 3, centred), moments(x.float(), [200] * 3, centred)
        assert torch.equal(found.means, wanted.means) and torch.equal(found.rms, wanted.rms)
        assert torch.equal(found.take_covariance(None), wanted.take_covariance(None))


def test_before_any_token_there_is_no_mean_and_no_covariance() -> None:
    empty = InputMoments(WIDTH, centred=True, with_covariance=True)
    assert torch.equal(empty.means, torch.zeros(1, WIDTH)) and torch.equal(empty.rms, torch.zeros(WIDTH))
    with pytest.raises(HessianError, match="no token"):
        empty.take_covariance(None)


def by_bin(parts: list[torch.Tensor], prior_fraction: float = 0.0) -> InputMoments:
    gathered = InputMoments(
        WIDTH, centred=True, with_covariance=True, num_bins=len(parts), by_bin=True, prior_fraction=prior_fraction
    )
    for timestep_bin, part in enumerate(parts):
        if len(part):
            gathered.add(part, torch.stack(torch.aminmax(part, dim=0)).float(), timestep_bin)
    return gathered


@each_mean
def test_by_bin_everything_is_about_the_mean_of_each_bin(mean: float) -> None:
    parts = [tokens(mean), tokens(0.0, seed=1) - mean]
    centred = torch.cat([part.double() - part.double().mean(0) for part in parts])
    found, unit = by_bin(parts), FLOAT32_UNIT * max(1.0, mean)
    for part, middle in zip(parts, found.means, strict=True):
        torch.testing.assert_close(middle.double(), part.double().mean(0), rtol=0, atol=4 * unit)
    torch.testing.assert_close(found.rms.double(), centred.square().mean(0).sqrt(), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.amax.double(), centred.abs().amax(0), rtol=1e-6, atol=8 * unit)
    wanted, size = centred.T @ centred / len(centred), max(1.0, mean) ** 2
    torch.testing.assert_close(found.take_covariance(None).double(), wanted, rtol=0, atol=1e-4 + 1e-5 * size)


def test_a_bin_without_tokens_has_the_mean_of_all_and_changes_nothing() -> None:
    x = tokens(5.0)
    with_empty, alone = by_bin([x, x[:0]], 0.125), by_bin([x], 0.125)
    torch.testing.assert_close(with_empty.means, alone.means.expand(2, WIDTH), rtol=1e-5, atol=1e-5)
    assert torch.equal(with_empty.rms, alone.rms) and bool(with_empty.rms_by_bin[1].isnan().all())
    torch.testing.assert_close(with_empty.take_covariance(None), alone.take_covariance(None))


def test_with_a_prior_no_feature_is_far_below_the_typical_one_and_the_others_hardly_change() -> None:
    x = tokens(0.0)
    x[:, 3] *= 1e-6
    plain, mixed = (by_bin([x], fraction) for fraction in (0.0, 0.125))
    others = torch.arange(WIDTH) != 3
    assert plain.rms[3] < 1e-5 * plain.typical_rms and mixed.rms[3] > 0.3 * plain.typical_rms
    torch.testing.assert_close(mixed.rms[others], plain.rms[others], rtol=0.2, atol=0)
    assert mixed.take_covariance(None)[3, 3] > 0.03 * plain.typical_rms**2


def test_the_prior_weighs_more_where_there_are_fewer_tokens() -> None:
    x = tokens(0.0)
    x[:, 3] = 0
    silent = [float(by_bin([x[:count]], 0.125).rms[3]) for count in (1, 8, 64, 600)]
    assert silent == sorted(silent, reverse=True)


def test_the_mean_of_one_token_is_hardly_believed_and_that_of_a_constant_is() -> None:
    x = tokens(5.0)
    assert bool((by_bin([x[:1]], 0.125).means.abs() < 0.22 * x[:1].abs()).all())
    constant = torch.full((NUM_TOKENS, WIDTH), 5.0)
    torch.testing.assert_close(by_bin([constant], 0.125).means[0], constant[0], rtol=1e-3, atol=0)
