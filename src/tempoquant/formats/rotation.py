"""The block-Hadamard rotation: it mixes sixteen consecutive features at a time, so that no feature
exceeds its group.

A group whose largest number is far above the others wastes its levels on it. An orthogonal
transform of x and of the weight's rows keeps their product, and spreads such numbers over sixteen.
Rotations for 4-bit inference: QuaRot (arXiv 2404.00456); in blocks as small as a group, MR-GPTQ
(arXiv 2509.23202).
"""

import torch

ROTATION_SIZE = 16
"""A power of four, so that 1 / √size is exact; no larger than any group, so it divides every
width.
"""


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Multiply each block of ROTATION_SIZE features by Sylvester's Hadamard matrix over 4, which is
    its own inverse.

    It takes sums and differences of halves, then of halves of halves, in x's dtype. This order is
    part of the definition, so that every kernel rounds alike.

    Args:
        x: (…, in) float32 or float64.

    Returns:
        same shape and dtype.
    """
    blocks = x.unflatten(-1, (-1, ROTATION_SIZE))
    half = ROTATION_SIZE // 2
    while half:
        first, second = blocks.unflatten(-1, (-1, 2, half)).unbind(-2)
        blocks = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half //= 2
    return (blocks * ROTATION_SIZE**-0.5).flatten(-2)
