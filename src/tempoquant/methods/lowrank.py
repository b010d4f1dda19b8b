"""The low-rank branch: a truncated SVD in 16 bits takes the outliers out of the weight. SVDQuant (arXiv 2411.05007),
equations 4 to 6."""

import torch


def truncated_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-`rank` approximation of a matrix, its singular values split as √S on both sides.

    Args:
        weight: (out, in) float32.
        rank: at most min(out, in).

    Returns:
        up (out, rank) and down (rank, in), float32; up · down is the approximation. The sign of each pair is fixed (the
        largest entry of `up`'s column is positive), so that equal inputs give equal factors.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    largest = u[:, :rank].abs().argmax(0)
    sign = torch.sign(u[largest, torch.arange(largest.numel(), device=u.device)])
    return u[:, :rank] * (root * sign), vh[:rank] * (root * sign).unsqueeze(1)
