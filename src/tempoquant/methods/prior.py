"""A prior (ours): the second moments of calibration tokens, mixed with white noise at the input's
typical energy.

A feature that calibration hardly saw has a tiny mean square. Smoothing would divide by it, the
regression of deflation would trust it, and GPTQ would propagate other features' errors into its
weights, since they cost nothing there. An ordinary value of that feature would then destroy the
token. docs/method.md derives the cost and the bounds of the prior.
"""

import torch

from tempoquant.formats import ROTATION_SIZE, rotate

PSEUDO_TOKENS = 8
"""Tokens of the prior added to calibration's: one token shows no spread, and hardly a mean."""
MATRIX_FRACTION = 0.25
"""Share of the prior in a covariance or Hessian, relative to that in a feature's energy:
correlation in calibration is worth more to a regression than to smoothing (docs/log.md).
"""

_STEADY = 1 / 64
_WIDEST_MOVE = 16.0
"""A constant may become another: the square of its mean counts in the prior's energy, up to 16
times the typical one. A feature whose variance is above 1/64 of the typical one has been seen to
move, and its mean counts less and less.
"""


def share(fraction: float, num_tokens: float) -> float:
    """Compute the prior's share of a moment: `fraction`, plus the share of PSEUDO_TOKENS tokens; 0
    if fraction is 0.
    """
    return 1 - (1 - fraction) * num_tokens / (num_tokens + PSEUDO_TOKENS) if fraction else 0.0


def typical_energy(variance: torch.Tensor, mean_square: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """Compute the energy of an ordinary feature: the square of the mean over features of their root
    mean squares.

    Neither one loud feature nor many silent ones decide it. A share ε of it in each feature's mean
    square raises the sum of all root mean squares by √ε at most, for any spread of energies.

    Args:
        variance: (in,) float64, mean square around the mean.
        mean_square: (in,) float64, mean square around zero; it counts for PSEUDO_TOKENS tokens, so
            that one token has a spread too.

    Returns:
        () float64.
    """
    return with_pseudo_tokens(variance, mean_square, num_tokens).sqrt().mean().square()


def prior_energy(variance: torch.Tensor, mean_square: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """Compute each feature's mean square in the prior: the typical one, and the mean's if the
    feature never moves.

    Returns:
        (in,) float64; arguments as for `typical_energy`.
    """
    typical = typical_energy(variance, mean_square, num_tokens)
    never_moves = _STEADY * typical / (_STEADY * typical + variance).clamp(min=torch.finfo(torch.float64).tiny)
    return typical + never_moves * torch.minimum((mean_square - variance).clamp(min=0), _WIDEST_MOVE * typical)


def shrunk_mean(mean: torch.Tensor, variance: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Shrink the mean of very few tokens toward zero, by the square of its share of chance.

    The share of chance in the mean's energy (James and Stein 1961) is the tokens' variance, divided
    by their number and by that energy. PSEUDO_TOKENS tokens at zero count in the variance, so that
    the mean of one token gets little trust. The square confines the effect to few tokens: from a
    hundred on, the mean stays as it is.

    Args:
        mean, variance: (bins, in) float64, of each feature.
        num_tokens: (bins, 1) float64; where it is 0 the result is 0.
    """
    energy = mean.square().mean(-1, keepdim=True)
    spread = with_pseudo_tokens(variance.mean(-1, keepdim=True), variance.mean(-1, keepdim=True) + energy, num_tokens)
    chance = spread / (num_tokens * energy).clamp(min=torch.finfo(torch.float64).tiny)
    return mean * torch.where(num_tokens > 0, 1 - chance.clamp(max=1).square(), 0)


def with_pseudo_tokens(spread: torch.Tensor, pseudo: torch.Tensor, num_tokens: torch.Tensor | float) -> torch.Tensor:
    """Mix a mean over tokens with PSEUDO_TOKENS more tokens of value `pseudo`."""
    return (num_tokens * spread + PSEUDO_TOKENS * pseudo) / (num_tokens + PSEUDO_TOKENS)


def add_prior_(moments: torch.Tensor, energy: torch.Tensor, fraction: float, rotated: bool = False) -> torch.Tensor:
    """Mix a covariance or Hessian (in, in) with uncorrelated features, in place.

    Args:
        energy: (in,) float32 or float64, mean square of each feature of the prior.
        fraction: the prior's share.
        rotated: whether `moments` belong to features rotated in blocks (`energy` belongs to those
            before the rotation).

    Returns:
        `moments`.
    """
    if not fraction:
        return moments
    moments.mul_(1 - fraction)
    if not rotated:
        moments.diagonal().add_(energy.to(moments.dtype), alpha=fraction)
        return moments
    blocks = rotate(rotate(energy.unflatten(0, (-1, ROTATION_SIZE)).diag_embed()).mT)
    for number, block in enumerate(blocks):
        inside = slice(number * ROTATION_SIZE, (number + 1) * ROTATION_SIZE)
        moments[inside, inside].add_(block.to(moments.dtype), alpha=fraction)
    return moments
