"""What GPTQ knows of a layer's input: the Hessian, and the feedback matrix made of it.

GPTQ (arXiv 2210.17323) reads its updates from a factor of H⁻¹. With H = M·D²·Mᵀ, M unit upper triangular, they are M
itself (QuIP, arXiv 2307.13304, shows that GPTQ is LDLQ), so that one factorization is enough and nothing is inverted.
"""

from typing import NamedTuple

import torch

from tempoquant.errors import HessianError
from tempoquant.methods.products import add_product_

_PANEL = 1024  # features: the products are wide enough for full speed, what is computed twice stays small


class HessianAccumulator:
    """The mean of xᵀx over tokens, gathered a batch at a time; only the blocks on and above the diagonal are summed.

    Args:
        in_features: width of the input.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._in_features, self._device = in_features, device
        self._sum: torch.Tensor | None = None
        self.num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in tokens: (…, in), any float dtype. They are copied, so memory asks for some thousand at a time."""
        if self._sum is None:
            self._sum = torch.zeros(self._in_features, self._in_features, dtype=torch.float32, device=self._device)
        by_feature = x.reshape(-1, x.shape[-1]).T.to(torch.float32, memory_format=torch.contiguous_format)
        for start in range(0, self._in_features, _PANEL):
            end = start + _PANEL
            add_product_(self._sum[start:end, start:], by_feature[start:end], by_feature[start:])
        self.num_tokens += by_feature.shape[1]

    @property
    def hessian(self) -> torch.Tensor:
        """(in, in) float32, symmetric; a copy. Raises HessianError before any token has come."""
        return _mirror_(self._require_sum().clone()).div_(self.num_tokens)

    @property
    def diagonal(self) -> torch.Tensor:
        """(in,) float32, of `hessian`; a copy. Raises HessianError before any token has come."""
        return self._require_sum().diagonal() / self.num_tokens

    def take(self) -> torch.Tensor:
        """`hessian` without a copy, at the price of starting again from no token."""
        hessian = _mirror_(self._require_sum()).div_(self.num_tokens)
        self._sum, self.num_tokens = None, 0
        return hessian

    def _require_sum(self) -> torch.Tensor:
        if self._sum is None or self.num_tokens == 0:
            raise HessianError("the Hessian has seen no token: give calibration inputs.")
        return self._sum


def _mirror_(matrix: torch.Tensor) -> torch.Tensor:
    """Copy what is above the diagonal below it, in place."""
    for start in range(0, matrix.shape[0], _PANEL):
        end = start + _PANEL
        diagonal_block = matrix[start:end, start:end].triu()
        matrix[start:end, start:end] = diagonal_block + diagonal_block.T.tril(-1)
        matrix[end:, start:end] = matrix[start:end, end:].T
    return matrix


class Feedback(NamedTuple):
    """matrix: (in, in), unit upper triangular; entry (j, k) is how much of weight j's change weight k takes up.
    needed_float64: whether the Hessian was positive definite in float64 only.
    order: (in,) int64, the features in the order of the matrix, in which they are rounded; None for their own."""

    matrix: torch.Tensor
    needed_float64: bool
    order: torch.Tensor | None = None


def act_order(diagonal: torch.Tensor) -> torch.Tensor:
    """(in,) int64: the features of a Hessian's diagonal by falling size, equal ones in their own order.

    Features rounded first make their errors while many others can still take them up, so those that matter most go
    first: "desc_act" of the GPTQ authors' code.
    """
    return diagonal.argsort(descending=True, stable=True)


def feedback_matrix(
    hessian: torch.Tensor, damping_fraction: float = 0.01, order: torch.Tensor | None = None
) -> Feedback:
    """Factor a Hessian for `gptq`; linears that read the same input share the result.

    Args:
        hessian: (in, in) float32 or float64, mean of xᵀx of the input the layer really sees (smoothed and quantized).
            It is overwritten, and is usually the memory of the result: the caller hands it over.
        damping_fraction: added to the diagonal, as a fraction of its mean over the features that are ever non-zero.
        order: (in,) int64, the order to round features in, such as `act_order`; None for their own.

    Raises:
        HessianError: the Hessian holds NaN or Inf; the damped one is not positive definite, not even in float64.
    """
    # A finite sum has finite terms, and is ten times faster than looking at each; a sum may also just overflow.
    if not bool(torch.isfinite(hessian.sum())) and not bool(torch.isfinite(hessian).all()):
        raise HessianError("the Hessian holds NaN or Inf: the calibration inputs are not finite.")
    if order is not None:
        _reorder_(hessian, order)
    diagonal = _damped_diagonal(hessian, damping_fraction)
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        # A failed factorization leaves everything below the diagonal as it was: the second try mirrors it back.
        matrix = hessian if dtype == hessian.dtype else _mirror_(_transposed(hessian, dtype))
        matrix.diagonal().copy_(diagonal)
        if _factor_(matrix):
            matrix.div_(matrix.diagonal().clone())
            return Feedback(matrix.triu_().to(hessian.dtype), dtype != hessian.dtype, order)
    raise HessianError(
        f"the Hessian of {hessian.shape[0]} features is not positive definite, not even in float64 with damping "
        f"{damping_fraction}: calibrate on more tokens, or raise damping_fraction."
    )


def _reorder_(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Rows and columns in another order, in place, a panel at a time."""
    for panel in (*matrix.split(_PANEL, 0), *matrix.T.split(_PANEL, 0)):
        panel.copy_(panel.index_select(1, order))


def _damped_diagonal(hessian: torch.Tensor, damping_fraction: float) -> torch.Tensor:
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0  # features that are always zero: any value decouples them, but damping must not feel it
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    return torch.where(dead, mean, diagonal) + damping_fraction * mean


def _factor_(matrix: torch.Tensor) -> bool:
    """Cholesky from the last feature to the first, H = M·Mᵀ with M upper triangular, written over the upper triangle.

    Returns whether the matrix was positive definite. Entries below the diagonal are neither read nor written.
    """
    size = matrix.shape[0]
    for start in reversed(range(0, size, _PANEL)):
        end = min(start + _PANEL, size)
        above, block = matrix[:start, start:end], matrix[start:end, start:end]
        left_alone = block.tril(-1)
        if end < size:  # panels to the right are finished: what they explain is taken off this one
            add_product_(matrix[:end, start:end], matrix[:end, end:], matrix[start:end, end:], sign=-1)
        reversed_factor, info = torch.linalg.cholesky_ex(_symmetric(block).flip(0, 1))
        if int(info) != 0:
            block.copy_(block.triu() + left_alone)
            return False
        factor = reversed_factor.flip(0, 1)
        block.copy_(factor + left_alone)
        above.copy_(torch.linalg.solve_triangular(factor.T, above, upper=False, left=False))
    return True


def _transposed(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return matrix.T.to(dtype, memory_format=torch.contiguous_format)


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix whose upper triangle is given."""
    upper = matrix.triu()
    return upper + upper.triu(1).T
