"""Smoothing: move part of an input feature's range into the weight. SmoothQuant (arXiv 2211.10438), equation 4."""

import math

import torch

from tempoquant.formats import Format
from tempoquant.formats.scales import E4M3_MAX

_E4M3_LEAST_NORMAL = 2.0**-6
# A clip ratio of 2 still fits above the largest scale that calibration has seen.
_E4M3_CEILING = E4M3_MAX / 2
_AMAX_OF_A_GROUP = 2.0
"""The largest of sixteen numbers over their root mean square, about."""


def smoothing_factor(
    activation: torch.Tensor, weight: torch.Tensor, alpha: float, prior_fraction: float = 0.0
) -> torch.Tensor:
    """Compute what each input feature is divided by: activation^α / weight^(1 − α).

    As published both are largest magnitudes. By root mean squares (ours) with α = 1/2 every feature gets the same
    energy in input and weight, whose product the rounding error follows, and one extreme token or weight decides
    nothing.

    Args:
        activation: (in,) float32, range of each input feature over the calibration tokens.
        weight: (in,) float32, the same of each weight column, over all linears that share the input.
        alpha: share of the input's range moved into the weight, in [0, 1].
        prior_fraction: share of a column's square that the mean column's has, so that a feature of hardly any weight
            is not multiplied without bound.

    Returns:
        (in,) float32, positive and finite. A feature that is zero everywhere, in input or weight, has factor 1.
    """
    if prior_fraction:
        mean = weight.mean().square()
        weight = torch.sqrt((1 - prior_fraction) * weight.square() + prior_fraction * mean)
    alive = (activation > 0) & (weight > 0)
    factor = activation.clamp(min=1e-20).pow(alpha) / weight.clamp(min=1e-20).pow(1 - alpha)
    return torch.where(alive, factor, torch.ones_like(factor))


def fit_scale_range(factor: torch.Tensor, amax: torch.Tensor, rms_by_bin: torch.Tensor, format: Format) -> torch.Tensor:
    """Multiply all factors by the power of two that puts activation scales in the middle of E4M3's range.

    What all features have in common is free: the weight's scales absorb it. Louder tokens than calibration's saturate
    above the range, quieter ones vanish below it. So the geometric middle between the largest scale that calibration
    has seen and a typical one of its quietest timestep bin becomes the range's own, as long as the largest fits.

    Args:
        factor: (in,) float32.
        amax: (in,) float32, largest magnitude of each input feature.
        rms_by_bin: (num_bins, in) float32, root mean squares in each timestep bin; NaN for a bin without tokens.
        format: others than those with E4M3 scales leave the factor as it is.

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
