"""SVDQuant (arXiv 2411.05007): the residual weight that smoothing and the low-rank branch leave for
four bits.
"""

from typing import NamedTuple

import torch

from tempoquant.errors import RecipeError
from tempoquant.layer import LowRankBranch
from tempoquant.methods.lowrank import truncated_svd


class Decomposition(NamedTuple):
    """A weight split in two.

    Attributes:
        branch: the 16-bit branch on raw x, or None.
        residual_weight: (out, in) float32, the part that is rounded.
    """

    branch: LowRankBranch | None
    residual_weight: torch.Tensor


def svdquant(weight: torch.Tensor, smoothing_factor: torch.Tensor | None, rank: int) -> Decomposition:
    """Split W · diag(s) into up · (down · diag(s)) + R, with up and down as they are stored.

    The residual is computed against the *rounded* branch, so that branch + residual is the weight,
    whatever bfloat16 lost. `down` already holds 1 / s, so that the branch reads the raw input.

    Args:
        weight: (out, in) float32.
        smoothing_factor: (in,) bfloat16, or None for none.
        rank: 0 for no branch.

    Raises:
        RecipeError: the rank exceeds the smaller side of the weight.
    """
    if rank > min(weight.shape):
        raise RecipeError(f"rank {rank} exceeds the smaller side of a weight of shape {tuple(weight.shape)}.")
    factor = None if smoothing_factor is None else smoothing_factor.float()
    smoothed = weight if factor is None else weight * factor
    if rank == 0:
        return Decomposition(None, smoothed)
    return split_with_factors(*truncated_svd(smoothed, rank), weight, smoothing_factor)


def split_with_factors(
    up: torch.Tensor, down: torch.Tensor, weight: torch.Tensor, smoothing_factor: torch.Tensor | None
) -> Decomposition:
    """Split a weight by given factors of the smoothed weight, up (out, rank) and down (rank, in),
    float32.
    """
    factor = None if smoothing_factor is None else smoothing_factor.float()
    smoothed = weight if factor is None else weight * factor
    down_raw = down if factor is None else down / factor
    branch = LowRankBranch(up.to(torch.bfloat16).contiguous(), down_raw.to(torch.bfloat16).contiguous())
    product = branch.product()
    return Decomposition(branch, smoothed - (product if factor is None else product * factor))
