"""Smoothing: move part of an input feature's range into the weight. SmoothQuant (arXiv 2211.10438), equation 4."""

import torch

from tempoquant.formats import Format
from tempoquant.formats.scales import E4M3_MAX

# Half of E4M3's largest number: a clip ratio of 2 then still fits, and all the room left is kept against underflow.
_E4M3_TARGET = E4M3_MAX / 2


def smoothing_factor(
    activation_amax: torch.Tensor,
    weight_amax: torch.Tensor,
    alpha: float,
    format: Format,
    activation_rms: torch.Tensor | None = None,
    weight_rms: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each input feature is divided by: activation_amax^α / weight_amax^(1 − α), as published; or the same of rms.

    By rms (ours) with α = 1/2 every feature gets the same energy in input and weight, whose product the rounding error
    follows, and one extreme token or weight decides nothing.

    The factor of all features together is free (the weight's scales absorb it), so for formats whose activation scales
    have a limited range (E4M3) it is chosen to centre them in it. It is a power of two, so that nothing else changes.

    Args:
        activation_amax: (in,) float32, largest magnitude of each input feature over the calibration tokens.
        weight_amax: (in,) float32, the same of each weight column, over all linears that share the input.
        alpha: share of the input's range moved into the weight, in [0, 1].
        activation_rms, weight_rms: (in,) float32, root mean squares of the same, used in place of the largest
            magnitudes when they are given.

    Returns:
        (in,) bfloat16, positive and finite. A feature that is zero everywhere, in input or weight, has factor 1.
    """
    alive = (activation_amax > 0) & (weight_amax > 0)
    activation = activation_amax if activation_rms is None else activation_rms
    weight = weight_amax if weight_rms is None else weight_rms
    factor = activation.clamp(min=1e-20).pow(alpha) / weight.clamp(min=1e-20).pow(1 - alpha)
    factor = torch.where(alive, factor, torch.ones_like(factor))
    if format.has_tensor_scale and bool(alive.any()):
        largest = (activation_amax / factor)[alive].max() / format.top_level
        factor = factor * torch.exp2(torch.ceil(torch.log2(largest / _E4M3_TARGET)))
    limits = torch.finfo(torch.bfloat16)
    return factor.clamp(limits.tiny, limits.max).to(torch.bfloat16)
