"""A prior (ours): second moments of calibration tokens, mixed with white noise at the input's typical energy.

A feature that calibration hardly saw has a tiny mean square. Smoothing would divide by it, the regression of deflation
would trust it, and GPTQ would push other features' errors into its weights, since they cost nothing there. An ordinary
value of that feature then destroys the token. docs/method.md derives what the prior costs and what it bounds.
"""

import torch

from tempoquant.formats import ROTATION_SIZE, rotate

PSEUDO_TOKENS = 8
"""How many tokens of the prior are added to calibration's: one token tells nothing of a spread, little of a mean."""
MATRIX_FRACTION = 0.25
"""Share of the prior in a covariance or Hessian, relative to that in a feature's energy: what is correlated in
calibration is worth more to a regression than to smoothing (docs/log.md)."""
_WIDEST_MOVE = 16.0
"""A mean counts in the prior's energy up to this many times the typical one: a constant may become another."""


def share(fraction: float, num_tokens: float) -> float:
    """Compute the prior's share of a moment: `fraction`, and PSEUDO_TOKENS tokens besides; 0 where fraction is 0."""
    return 1 - (1 - fraction) * num_tokens / (num_tokens + PSEUDO_TOKENS) if fraction else 0.0


def typical_energy(variance: torch.Tensor, about_zero: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """Compute the energy of an ordinary feature: the square of the mean over features of their root mean squares.

    Neither one loud feature nor many silent ones decide it. With a share ε of it in each feature's mean square, the sum
    of all root mean squares grows by √ε at most, however the energies are spread.

    Args:
        variance: (in,) float64, mean square about the mean.
        about_zero: (in,) float64, mean square; PSEUDO_TOKENS tokens of it count, so that one token has a spread too.

    Returns:
        () float64.
    """
    return with_pseudo_tokens(variance, about_zero, num_tokens).sqrt().mean().square()


def prior_energy(variance: torch.Tensor, about_zero: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """Compute each feature's mean square in the prior: the typical energy, and what the feature's mean has.

    Returns:
        (in,) float64; arguments as for `typical_energy`.
    """
    typical = typical_energy(variance, about_zero, num_tokens)
    return typical + (about_zero - variance).clamp(min=0).clamp(max=_WIDEST_MOVE * typical)


def certain_mean(mean: torch.Tensor, variance: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Shrink means by what of them may be chance: mean · mean² / (mean² + error²).

    error² is the variance of a mean of so many tokens, times PSEUDO_TOKENS, which count in the variance too.

    Args:
        mean, variance: (…, in) float64, of each feature.
        num_tokens: broadcastable to them; where it is 0 the result is 0.
    """
    spread = with_pseudo_tokens(variance, variance + mean.square(), num_tokens)
    error = PSEUDO_TOKENS * spread / num_tokens.clamp(min=1)
    certain = mean.square() / (mean.square() + error).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(num_tokens > 0, mean * certain, torch.zeros_like(mean))


def with_pseudo_tokens(spread: torch.Tensor, pseudo: torch.Tensor, num_tokens: torch.Tensor | float) -> torch.Tensor:
    """Mix a mean over tokens with PSEUDO_TOKENS tokens more, of which each has `pseudo`."""
    return (num_tokens * spread + PSEUDO_TOKENS * pseudo) / (num_tokens + PSEUDO_TOKENS)


def add_prior_(moments: torch.Tensor, energy: torch.Tensor, fraction: float, rotated: bool = False) -> torch.Tensor:
    """Mix a covariance or Hessian (in, in) with uncorrelated features, in place.

    Args:
        energy: (in,) float32, mean square of each feature of the prior.
        fraction: the prior's share.
        rotated: whether `moments` are of features rotated in blocks (and `energy` of those before).

    Returns:
        `moments`.
    """
    if not fraction:
        return moments
    moments.mul_(1 - fraction)
    if not rotated:
        moments.diagonal().add_(energy, alpha=fraction)
        return moments
    blocks = rotate(rotate(energy.unflatten(0, (-1, ROTATION_SIZE)).diag_embed()).mT)
    for number, block in enumerate(blocks):
        inside = slice(number * ROTATION_SIZE, (number + 1) * ROTATION_SIZE)
        moments[inside, inside].add_(block, alpha=fraction)
    return moments
