"""Clip search: one clip ratio per layer and timestep bin, chosen from candidates.

Source: arXiv 2605.27003, section on timestep-aware activation clipping. The paper's exponent offset
k is folded in as ·2^k.
"""

from collections.abc import Sequence

import torch

from tempoquant.formats import Format, ScaleRule, quantize_activation
from tempoquant.methods.products import product

_CHUNK_ROWS = 4096  # tokens times candidates in one product: bounds memory, and reads the residual once for all


def clip_errors(
    smoothed: torch.Tensor, residual: torch.Tensor, format: Format, rule: ScaleRule, candidates: Sequence[float]
) -> torch.Tensor:
    """Compute the squared output error of each candidate clip ratio on some tokens: ‖(Q(x) −
    x)·Q(R)ᵀ‖².

    The reference is the quantized layer with unquantized activations; the branch and the bias read
    the raw x and cancel. Errors of linears that share an input, and of tokens of one bin, add.

    Args:
        smoothed: (tokens, in) float32, x divided by the smoothing factor.
        residual: Q(R) dequantized, (out, in) float32; several linears that share the input may be
            stacked along out.
        candidates: clip ratios.

    Returns:
        (candidates,) float64, on the CPU.
    """
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for rows in smoothed.split(max(1, _CHUNK_ROWS // len(candidates))):
        rounding_errors = torch.cat([quantize_activation(rows, format, rule, c).sub_(rows) for c in candidates])
        squares = product(rounding_errors, residual).square_()
        errors += squares.view(len(candidates), -1).sum(1, dtype=torch.float64).cpu()
    return errors


def best_clip_ratio(errors: torch.Tensor, candidates: Sequence[float]) -> torch.Tensor:
    """Return the candidate with the least error in each timestep bin; the first minimum wins.

    Args:
        errors: (bins, candidates), from `clip_errors`; every bin has seen tokens.

    Returns:
        (bins,) float32.
    """
    return torch.tensor(candidates, dtype=torch.float32)[errors.argmin(1).cpu()]
