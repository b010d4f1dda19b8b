"""The low-rank branch: a truncated SVD in 16 bits takes the outliers out of the weight.

Source: SVDQuant (arXiv 2411.05007), equations 4 to 6. Large matrices use randomized subspace
iteration: Halko, Martinsson and Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.
"""

import torch

# Up to this smaller side the exact decomposition takes a moment anyway.
EXACT_UP_TO = 1024
# Measured (docs/method.md): the residual's squared norm is within 0.1 % of the least possible up to
# rank 32, and within 0.3 % at rank 128, even for a flat spectrum, which is hardest.
OVERSAMPLING = 32
ITERATIONS = 8
SEED = 0


def truncated_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best rank-`rank` approximation of a matrix, with √S of its singular values in both
    factors.

    If the smaller side is large and the rank is not, its squared error is within a fraction of a
    percent of the best (docs/method.md); the random numbers come from a generator with a fixed
    seed.

    Args:
        weight: (out, in) float32.
        rank: at most min(out, in).

    Returns:
        up (out, rank) and down (rank, in), float32; up · down is the approximation. The sign of
        each pair is fixed (the largest entry of `up`'s column is positive), so that equal inputs
        give equal factors.
    """
    smaller_side = min(weight.shape)
    if smaller_side <= EXACT_UP_TO or 4 * (rank + OVERSAMPLING) > smaller_side:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = _randomized_svd(weight, rank + OVERSAMPLING)
    root = s[:rank].sqrt()
    largest = u[:, :rank].abs().argmax(0)
    sign = torch.sign(u[largest, torch.arange(largest.numel(), device=u.device)])
    return u[:, :rank] * (root * sign), vh[:rank] * (root * sign).unsqueeze(1)


def _randomized_svd(weight: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the SVD of a matrix projected on `width` directions close to its leading ones."""
    generator = torch.Generator().manual_seed(SEED)  # on the CPU, so that every device starts from the same numbers
    start = torch.randn(weight.shape[1], width, generator=generator, dtype=weight.dtype).to(weight.device)
    basis = torch.linalg.qr(weight @ start).Q
    for _ in range(ITERATIONS):
        # Each half step is orthogonalized again: powers of the singular values would leave
        # float32's range.
        other = torch.linalg.qr((basis.T @ weight).T).Q
        basis = torch.linalg.qr(weight @ other).Q
    small_u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ small_u, s, vh
