"""The rule "least_error" chooses, of a few scales, the one that rounds a group best; every program
chooses alike.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.formats import (
    FORMATS,
    MXFP4,
    NVFP4,
    NVFP4_M1,
    Format,
    ScaleRule,
    from_codes,
    group_amax,
    group_scale,
    quantize_activation,
    to_codes,
    weight_scale,
)
from tests.random_layers import random

LEAST = ScaleRule.LEAST_ERROR
NUM_GROUPS = 3
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
clip_ratios = st.sampled_from([0.7, 1.0, 1.3])


def with_tails(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return float64 numbers with tails, but no group so far from its neighbours that a window of
    scales would matter.
    """
    return random(*shape, seed=seed, dtype=torch.float64).pow(3)


def importances(in_features: int, seed: int = 1) -> torch.Tensor:
    return with_tails(in_features, seed=seed).tanh().mul(3).exp()  # from 1/20 to 20


def group_errors(x: torch.Tensor, rounded: torch.Tensor, format: Format) -> torch.Tensor:
    return (x - rounded).square().unflatten(-1, (-1, format.group_size)).sum(-1)


def first_of_the_least(errors: list[torch.Tensor]) -> torch.Tensor:
    best = torch.zeros_like(errors[0], dtype=torch.long)
    for candidate, error in enumerate(errors):
        best[error < torch.stack(errors).gather(0, best.unsqueeze(0))[0]] = candidate
    return best


def tried(x: torch.Tensor, format: Format, clip_ratio: float) -> list[torch.Tensor]:
    """Return the input rounded with each candidate in turn; without candidates all groups take the
    same multiple of amax.
    """
    return [quantize_activation(x, format, ScaleRule.CEIL, clip_ratio * c) for c in format.scale_candidates]


@each_format
@given(seed=st.integers(0, 10**6), clip_ratio=clip_ratios)
def test_no_candidate_leaves_a_group_less_error_and_so_not_the_first(
    format: Format, seed: int, clip_ratio: float
) -> None:
    x = with_tails(8, NUM_GROUPS * format.group_size, seed=seed)
    chosen = group_errors(x, quantize_activation(x, format, LEAST, clip_ratio), format)
    for rounded in tried(x, format, clip_ratio):
        assert bool((chosen <= group_errors(x, rounded, format) * (1 + 1e-12)).all())


@each_format
@given(seed=st.integers(0, 10**6), clip_ratio=clip_ratios)
def test_an_activation_is_what_trying_each_candidate_gives(format: Format, seed: int, clip_ratio: float) -> None:
    x = with_tails(8, NUM_GROUPS * format.group_size, seed=seed)
    candidates = tried(x, format, clip_ratio)
    best = first_of_the_least([group_errors(x, rounded, format) for rounded in candidates])
    per_number = best.repeat_interleave(format.group_size, -1).unsqueeze(0)
    assert torch.equal(
        quantize_activation(x, format, LEAST, clip_ratio), torch.stack(candidates).gather(0, per_number)[0]
    )


def weight_scales_by_trying(weight: torch.Tensor, format: Format, feature_weight: torch.Tensor) -> torch.Tensor:
    amax, tensor = group_amax(weight, format).float(), weight_scale(weight, format, ScaleRule.CEIL).tensor
    scales = [group_scale(amax, format, LEAST, c, tensor) for c in format.scale_candidates]
    errors = []
    for scale in scales:
        effective = (scale * tensor).double()
        rounded = from_codes(to_codes(weight, effective, format), effective, format)
        root = feature_weight.sqrt()
        errors.append(group_errors(weight * root, rounded * root, format))
    return torch.stack(scales).gather(0, first_of_the_least(errors).unsqueeze(0))[0]


@each_format
@given(seed=st.integers(0, 10**6))
def test_the_scales_of_a_weight_are_what_trying_each_candidate_gives(format: Format, seed: int) -> None:
    weight = with_tails(8, NUM_GROUPS * format.group_size, seed=seed)
    importance = importances(weight.shape[1], seed + 1)
    plain, weighted = weight_scale(weight, format, LEAST), weight_scale(weight, format, LEAST, importance)
    assert torch.equal(plain.group, weight_scales_by_trying(weight, format, torch.ones_like(importance)))
    assert torch.equal(weighted.group, weight_scales_by_trying(weight, format, importance))
    assert torch.equal(plain.tensor, weighted.tensor)


@each_format
def test_what_an_error_counts_for_decides_and_a_common_factor_does_not(format: Format) -> None:
    weight = with_tails(200, NUM_GROUPS * format.group_size)
    importance = importances(weight.shape[1])
    plain, weighted = (weight_scale(weight, format, LEAST, w).group for w in (None, importance))
    assert not torch.equal(plain, weighted)
    assert torch.equal(weight_scale(weight, format, LEAST, torch.full_like(importance, 2.0)).group, plain)
    assert torch.equal(weight_scale(weight, format, LEAST, importance * 2.0**20).group, weighted)


@each_format
def test_features_that_count_for_nothing_may_be_anything_small(format: Format) -> None:
    weight = with_tails(50, NUM_GROUPS * format.group_size)
    matters = torch.arange(weight.shape[1]) % 3 != 0
    other = torch.where(matters | (weight.abs() > 0.1), weight, weight / 2)  # below every group's largest magnitude
    assert not torch.equal(other, weight)
    one, two = (weight_scale(w, format, LEAST, matters.double()).group for w in (weight, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("format", [NVFP4, NVFP4_M1], ids=["nvfp4", "nvfp4_m1"])
def test_of_scales_that_all_leave_nothing_the_first_is_taken(format: Format) -> None:
    """6 and −6 are six ones, and four times 1.5; the first row's magnitude makes the tensor scale
    1.
    """
    weight = torch.zeros(2, 2 * format.group_size)
    weight[0, 0] = 6 * (256.0 if format is NVFP4_M1 else 448.0)
    weight[1, 3], weight[1, format.group_size] = 6.0, -6.0
    scale = weight_scale(weight, format, LEAST)
    assert scale.tensor == 1 and scale.group[1].tolist() == [1.0, 1.0]


def test_of_scales_with_equal_errors_the_first_is_taken() -> None:
    """3.5 becomes 4 with scale 1, and saturates at 3 with scale ½."""
    x = torch.zeros(1, MXFP4.group_size)
    x[0, 7] = 3.5
    assert quantize_activation(x, MXFP4, LEAST)[0, 7] == 4.0
    assert weight_scale(x, MXFP4, LEAST).group.tolist() == [[1.0]]


@each_format
def test_choices_do_not_depend_on_what_else_is_in_the_batch(format: Format) -> None:
    x = with_tails(2, 5, NUM_GROUPS * format.group_size).float()
    importance = importances(x.shape[-1]).float()
    together, weights = quantize_activation(x, format, LEAST), weight_scale(x[0], format, LEAST, importance)
    for i, j in np.ndindex(2, 5):
        assert torch.equal(quantize_activation(x[i, j], format, LEAST), together[i, j])
    strided = quantize_activation(x.transpose(0, 1), format, LEAST)
    assert torch.equal(strided.transpose(0, 1), together)
    assert torch.equal(
        weight_scale(x[0, [3, 1, 4, 2, 0]], format, LEAST, importance).group, weights.group[[3, 1, 4, 2, 0]]
    )


def nearest_level_in_numpy(scaled: np.ndarray, format: Format) -> np.ndarray:
    levels = np.array(format.levels, np.float32)
    midpoints = (levels[1:] + levels[:-1]) / 2
    magnitude = np.abs(scaled)[..., None]
    code = np.where(np.arange(7) % 2 == 0, magnitude > midpoints, magnitude >= midpoints).sum(-1)  # ties to even
    return np.copysign(levels[code], scaled)


@each_format
def test_another_program_that_sums_by_halves_in_float32_chooses_the_same(format: Format) -> None:
    """Many groups, so that some candidates all but tie and the order of the sum decides."""
    x = with_tails(3000, NUM_GROUPS * format.group_size).float()
    amax = group_amax(x, format)
    grouped = x.unflatten(-1, (-1, format.group_size)).numpy()
    best_error, best = None, None
    for candidate in format.scale_candidates:
        scale = group_scale(amax, format, LEAST, candidate).unsqueeze(-1).numpy()
        rounded = nearest_level_in_numpy(grouped / scale, format) * scale
        error = np.square(rounded - grouped)
        while (half := error.shape[-1] // 2) > 0:
            error = error[..., :half] + error[..., half:]
        if best_error is None or best is None:
            best_error, best = error, rounded
        else:
            best = np.where(error < best_error, rounded, best)
            best_error = np.minimum(error, best_error)
    assert best is not None
    assert torch.equal(quantize_activation(x, format, LEAST), torch.from_numpy(best).flatten(-2))
