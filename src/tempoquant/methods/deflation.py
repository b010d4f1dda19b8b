"""Deflation (ours): the 16-bit branch takes its directions out of the *input* too; four bits hold
only the rest.

SVDQuant's branch reads h = x̃ · Pᵀ, a few directions of the input in 16 bits, and removes from the
weight the part that acts on them. But x̃ itself is still rounded whole, though the branch knows
that part of it exactly. Deflation subtracts that part,

    z = x̃ − h · Vᵀ ,   x̃ · W̃ᵀ = z · Rᵀ + h · (C + R·V)ᵀ   with   R = W̃ − C · P

for any C and V, and only z is rounded. ResQ (arXiv 2412.14363) keeps leading directions of
activations in more bits, by a rotation of the features. Here the features stay, and the directions
depend on weight and input together. docs/method.md derives it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tempoquant.errors import RecipeError
from tempoquant.formats import rotate
from tempoquant.methods.lowrank import EXACT_UP_TO, ITERATIONS, OVERSAMPLING, SEED
from tempoquant.methods.products import product


class Deflation(NamedTuple):
    """A deflation as it is stored; linears that read one input share it.

    Attributes:
        down: (rank, in) bfloat16; already holds 1 / smoothing_factor, so h = x · downᵀ reads the
            raw input.
        deflation: (in, rank) bfloat16, or (num_bins, in, rank), one for each timestep bin; h ·
            deflationᵀ is subtracted from the smoothed input, or from the rotated one.
    """

    down: torch.Tensor
    deflation: torch.Tensor


def deflation_of(
    covariance: torch.Tensor,
    weights: Sequence[torch.Tensor],
    smoothing_factor: torch.Tensor | None,
    rank: int,
    rotated: bool = False,
) -> Deflation:
    """Compute the directions worth most to weight and input together, and their regression on the
    input.

    P spans the leading eigenvectors of covariance / trace + Σ W̃ᵀW̃ / trace. The rounding error is
    roughly the energy left in the input times the energy left in the weight; to first order, this
    choice lowers its logarithm most. V is the linear regression of x̃ on h, which makes z as small
    as possible.

    Args:
        covariance: (in, in) float32, mean of x̃ᵀx̃ of the smoothed (and centred) input; not
            changed.
        weights: (out, in) float32 each, smoothed.
        smoothing_factor: (in,) bfloat16, or None for none.
        rank: above 0.
        rotated: whether the rest of the input is rotated in blocks. The directions do not depend on
            it.

    Raises:
        RecipeError: the rank exceeds the smaller side of a weight.
    """
    for weight in weights:
        if rank > min(weight.shape):
            raise RecipeError(f"rank {rank} exceeds the smaller side of a weight of shape {tuple(weight.shape)}.")
    return deflation_along(leading_directions(covariance, weights, rank), covariance, smoothing_factor, rotated)


def leading_directions(covariance: torch.Tensor, weights: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """Compute the directions of `deflation_of`, (rank, in) float32, orthonormal, the most valuable
    first.

    The first of many directions are those of a smaller rank: exactly up to 1024 features, nearly
    beyond.
    """
    energy = sum(float(weight.square().sum(dtype=torch.float64)) for weight in weights)
    variance = float(covariance.diagonal().sum(dtype=torch.float64))

    def gram(x: torch.Tensor) -> torch.Tensor:  # (in, k) to (in, k)
        total = product(covariance, x.T) / max(variance, torch.finfo(torch.float32).tiny)
        for weight in weights:
            total += product(weight.T, product(weight, x.T).T) / max(energy, torch.finfo(torch.float32).tiny)
        return total

    return _leading_eigenvectors(gram, covariance, rank).T


def deflation_along(
    directions: torch.Tensor, covariance: torch.Tensor, smoothing_factor: torch.Tensor | None, rotated: bool = False
) -> Deflation:
    """Compute the deflation along given directions (rank, in) float32; the other arguments are as
    for `deflation_of`.
    """
    factor = 1.0 if smoothing_factor is None else smoothing_factor.float()
    down = (directions / factor).to(torch.bfloat16).contiguous()
    stored = down.float() * factor
    return Deflation(down, regression(product(stored, covariance), stored, rotated))


def regression(cross_covariance: torch.Tensor, directions: torch.Tensor, rotated: bool = False) -> torch.Tensor:
    """Compute V, the regression of the smoothed input on h, from the covariance of both.

    Args:
        cross_covariance: (rank, in) float32, mean of hᵀx̃.
        directions: (rank, in) float32, as the branch reads the smoothed input.
        rotated: as for `deflation_of`.

    Returns:
        (in, rank) bfloat16.
    """
    within = (cross_covariance @ directions.T).double()
    within.diagonal().add_(1e-7 * within.diagonal().mean() + torch.finfo(torch.float32).tiny)
    deflation = torch.linalg.solve(within, cross_covariance.double())
    deflation = (rotate(deflation) if rotated else deflation).T
    return deflation.to(torch.bfloat16).contiguous()


def split_weight(
    weight: torch.Tensor, smoothing_factor: torch.Tensor | None, shared: Deflation, rotated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a weight between the branch and four bits.

    Args:
        weight: (out, in) float32, smoothed.
        rotated: as it was for `deflation_of`.

    Returns:
        up (out, rank) bfloat16, or (num_bins, out, rank), and residual_weight (out, in) float32,
        which acts on the deflated input and is rotated with it.
    """
    stored = shared.down.float() * (1.0 if smoothing_factor is None else smoothing_factor.float())
    taken = torch.linalg.solve(stored @ stored.T, product(stored, weight)).T
    residual = weight - taken @ stored
    residual = rotate(residual) if rotated else residual
    by_bin = shared.deflation.reshape(-1, *shared.deflation.shape[-2:])
    up = torch.stack([taken + product(residual, each.float().T) for each in by_bin])
    up = up.reshape(*shared.deflation.shape[:-2], *taken.shape)
    return up.to(torch.bfloat16).contiguous(), residual


def _leading_eigenvectors(gram: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor, rank: int) -> torch.Tensor:
    """Compute the leading eigenvectors, (in, rank), of a positive semidefinite matrix given by its
    products; orthonormal, with fixed signs.
    """
    size = like.shape[0]
    if size <= EXACT_UP_TO:
        basis = torch.eye(size, dtype=like.dtype, device=like.device)
    else:  # subspace iteration: Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4
        generator = torch.Generator().manual_seed(SEED)  # on the CPU: every device starts from the same numbers
        start = torch.randn(size, min(rank + OVERSAMPLING, size), generator=generator, dtype=like.dtype)
        basis = torch.linalg.qr(gram(start.to(like.device))).Q
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(gram(basis)).Q
    small = basis.T @ gram(basis)
    _, vectors = torch.linalg.eigh((small + small.T) / 2)
    leading = basis @ vectors[:, -rank:].flip(1)
    largest = leading.abs().argmax(0)
    return leading * torch.sign(leading[largest, torch.arange(rank, device=leading.device)])
