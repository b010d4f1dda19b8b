"""The smoothing of an input, and the features that calibration hardly saw."""

from collections.abc import Sequence

import torch

from tempoquant.calibrate.input_moments import InputMoments
from tempoquant.formats import Format
from tempoquant.layer import HardlySeen
from tempoquant.methods import fit_scale_range, smoothing_factor
from tempoquant.recipe import Recipe

HARDLY_SEEN_FRACTION = 0.01
"""A feature is hardly seen if its root mean square is below this share of the input's typical
one.
"""


def smoothing_of(
    moments: InputMoments, weights: Sequence[torch.Tensor], recipe: Recipe, format: Format
) -> torch.Tensor | None:
    """Compute the smoothing factor (in,) bfloat16 of linears that read one input; None without
    smoothing.

    Args:
        weights: (out, in) each, any float dtype.
    """
    if recipe.smoothing_alpha is None:
        return None
    ranges = _ranges(moments, weights, recipe)
    factor = smoothing_factor(*ranges, recipe.smoothing_alpha, recipe.prior_fraction)
    return fit_scale_range(factor, moments.amax, moments.rms_by_bin, format)


def hardly_seen(moments: InputMoments, weights: Sequence[torch.Tensor], recipe: Recipe) -> HardlySeen | None:
    """Find the features that calibration hardly saw, and how much smoothing amplifies an ordinary
    value in one.

    Returns:
        None if there are none.
    """
    typical = moments.typical_rms
    silent = moments.plain_rms < HARDLY_SEEN_FRACTION * typical
    count = int(silent.sum())
    if not count:
        return None
    amplification = 1.0
    if recipe.smoothing_alpha is not None:
        activation, weight = _ranges(moments, weights, recipe)
        ordinary = torch.where(silent, activation.clamp(min=typical), activation)
        both = [
            smoothing_factor(a, weight, recipe.smoothing_alpha, recipe.prior_fraction) for a in (ordinary, activation)
        ]
        amplification = float((both[0] / both[1])[silent].max())
    return HardlySeen(count, amplification)


def _ranges(
    moments: InputMoments, weights: Sequence[torch.Tensor], recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two ranges that smoothing balances, the input's and the weights', (in,) float32
    each, by the recipe's statistic.
    """
    if recipe.smoothing_statistic == "rms":
        squares = torch.stack([weight.float().square().sum(0) for weight in weights]).sum(0)
        return moments.rms, torch.sqrt(squares / sum(len(weight) for weight in weights))
    activation = torch.maximum(moments.amax, moments.rms) if recipe.prior_fraction else moments.amax
    return activation, torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
