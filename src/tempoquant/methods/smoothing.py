"""Smoothing: move part of an input feature's range into the weight. SmoothQuant (arXiv 2211.10438),
equation 4.
"""

import math

import torch

from tempoquant.formats import Format
from tempoquant.formats.scales import E4M3_MAX

_E4M3_LEAST_NORMAL = 2.0**-6
# A clip ratio of 2 still fits above the largest scale that calibration has seen.
_E4M3_CEILING = E4M3_MAX / 2
_AMAX_OF_A_GROUP = 2.0
"""The approximate ratio of the largest of sixteen numbers to their root mean square."""


def smoothing_factor(
    activation: torch.Tensor, weight: torch.Tensor, alpha: float, prior_fraction: float = 0.0
) -> torch.Tensor:
    """Compute the divisor of each input feature: activation^α / weight^(1 − α).

    As published, both are largest magnitudes. With root mean squares (ours) and α = 1/2 every
    feature gets the same energy in input and weight, whose product the rounding error follows; one
    extreme token or weight decides nothing.

    Args:
        activation: (in,) float32, range of each input feature over the calibration tokens.
        weight: (in,) float32, the same of each weight column, over all linears that share the
            input.
        alpha: share of the input's range moved into the weight, in [0, 1].
        prior_fraction: share of the mean column's square in a column's square, which bounds the
            factor of a feature with almost no weight.

    Returns:
        (in,) float32, positive and finite. A feature that is zero everywhere, in input or weight,
        has factor 1.
    """
    if prior_fraction:
        mean = weight.mean().square()
        weight = torch.sqrt((1 - prior_fraction) * weight.square() + prior_fraction * mean)
    alive = (activation > 0) & (weight > 0)
    factor = activation.clamp(min=1e-20).pow(alpha) / weight.clamp(min=1e-20).pow(1 - alpha)
    return torch.where(alive, factor, torch.ones_like(factor))


def fit_scale_range(factor: torch.Tensor, amax: torch.Tensor, rms_by_bin: torch.Tensor, format: Format) -> torch.Tensor:
    """Multiply all factors by the power of two that puts activation scales in the middle of E4M3's
    range.

    A common factor of all features is free, since the weight's scales absorb it. Tokens louder than
    calibration's saturate above the range; quieter ones vanish below it. So the middle of the range
    becomes the geometric mean of the largest scale that calibration has seen and a typical scale of
    its quietest timestep bin, as long as the largest fits.

    Args:
        factor: (in,) float32.
        amax: (in,) float32, largest magnitude of each input feature.
        rms_by_bin: (num_bins, in) float32, root mean squares in each timestep bin; NaN for a bin
            without tokens.
        format: formats without E4M3 scales leave the factor unchanged.

    Returns:
        (in,) bfloat16.
    """
    if format.has_tensor_scale:
        largest = float((amax / factor).max()) / format.top_level
        energies = (rms_by_bin / factor).square().mean(1).sqrt()
        quiet = [float(each) for each in energies if float(each) > 0]
        if largest > 0 and quiet:
            quietest = min(largest, _AMAX_OF_A_GROUP * min(quiet) / format.top_level)
            middle = math.log2(E4M3_MAX * _E4M3_LEAST_NORMAL) / 2
            shift = (math.log2(largest) + math.log2(quietest)) / 2 - middle
            shift = max(math.floor(shift + 0.5), math.ceil(math.log2(largest / _E4M3_CEILING)))
            factor = factor * 2.0**shift
    limits = torch.finfo(torch.bfloat16)
    return factor.clamp(limits.tiny, limits.max).to(torch.bfloat16)
