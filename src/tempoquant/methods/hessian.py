"""The Hessian of a layer's input, and the feedback matrix that GPTQ makes of it.

GPTQ (arXiv 2210.17323) reads its updates from a factor of H⁻¹. With H = M·D²·Mᵀ, M unit upper
triangular, the updates are M itself (QuIP, arXiv 2307.13304, shows that GPTQ is LDLQ). So one
factorization is enough, and no matrix is inverted.
"""

from typing import NamedTuple

import torch

from tempoquant.errors import HessianError
from tempoquant.methods.products import add_product_

_PANEL = 1024  # features: wide enough for products at full speed, narrow enough that little is computed twice


class HessianAccumulator:
    """The mean of xᵀx over tokens, accumulated batch by batch; only the blocks on and above the
    diagonal are summed.

    Args:
        in_features: width of the input.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._in_features, self._device = in_features, device
        self._sum: torch.Tensor | None = None
        self.num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add tokens: (…, in), any float dtype. They are copied, so pass a few thousand at a
        time.
        """
        if self._sum is None:
            self._sum = torch.zeros(self._in_features, self._in_features, dtype=torch.float32, device=self._device)
        by_feature = x.reshape(-1, x.shape[-1]).T.to(torch.float32, memory_format=torch.contiguous_format)
        for start in range(0, self._in_features, _PANEL):
            end = start + _PANEL
            add_product_(self._sum[start:end, start:], by_feature[start:end], by_feature[start:])
        self.num_tokens += by_feature.shape[1]

    @property
    def hessian(self) -> torch.Tensor:
        """Return the Hessian, (in, in) float32, symmetric; a copy. Raises HessianError before any
        token has come.
        """
        return _mirror_(self._require_sum().clone()).div_(self.num_tokens)

    @property
    def diagonal(self) -> torch.Tensor:
        """Return the diagonal of `hessian`, (in,) float32; a copy. Raises HessianError before any
        token has come.
        """
        return self._require_sum().diagonal() / self.num_tokens

    def take(self) -> torch.Tensor:
        """Return `hessian` without a copy; the accumulator starts again without tokens."""
        hessian = _mirror_(self._require_sum()).div_(self.num_tokens)
        self._sum, self.num_tokens = None, 0
        return hessian

    def _require_sum(self) -> torch.Tensor:
        if self._sum is None or self.num_tokens == 0:
            raise HessianError("the Hessian has seen no token: pass calibration inputs.")
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
    """The factor of a Hessian from which `gptq` reads its updates.

    Attributes:
        matrix: (in, in), unit upper triangular; entry (j, k) is the share of weight j's error that
            weight k takes.
        needed_float64: whether the Hessian was positive definite in float64 only.
        order: (in,) int64, the features in the order of the matrix, in which they are rounded; None
            for their own.
    """

    matrix: torch.Tensor
    needed_float64: bool
    order: torch.Tensor | None = None


def act_order(diagonal: torch.Tensor) -> torch.Tensor:
    """Order the features by falling diagonal of the Hessian, (in,) int64; equal ones keep their own
    order.

    The error of a feature rounded early can still be propagated to many others, so the features
    that matter most go first: "desc_act" in the GPTQ authors' code.
    """
    return diagonal.argsort(descending=True, stable=True)


def feedback_matrix(
    hessian: torch.Tensor, damping_fraction: float = 0.01, order: torch.Tensor | None = None
) -> Feedback:
    """Factor a Hessian for `gptq`; linears that read the same input share the result.

    Args:
        hessian: (in, in) float32 or float64, mean of xᵀx of the input that the layer really sees
            (smoothed and quantized). It is overwritten, and the result usually takes its memory.
        damping_fraction: added to the diagonal, as a fraction of its mean over the features that
            are ever non-zero.
        order: (in,) int64, the order to round features in, such as `act_order`; None for their own.

    Raises:
        HessianError: the Hessian holds NaN or Inf, or the damped one is not positive definite, even
            in float64.
    """
    # A finite sum has finite terms, and takes a tenth of the time of a look at each. A sum may also
    # overflow.
    if not bool(torch.isfinite(hessian.sum())) and not bool(torch.isfinite(hessian).all()):
        raise HessianError("the Hessian holds NaN or Inf: the calibration inputs are not finite.")
    if order is not None:
        _reorder_(hessian, order)
    diagonal = _damped_diagonal(hessian, damping_fraction)
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        # A failed factorization leaves everything below the diagonal unchanged: the second try
        # mirrors it back.
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
    """Reorder rows and columns in place, a panel at a time."""
    for panel in (*matrix.split(_PANEL, 0), *matrix.T.split(_PANEL, 0)):
        panel.copy_(panel.index_select(1, order))


def _damped_diagonal(hessian: torch.Tensor, damping_fraction: float) -> torch.Tensor:
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0  # features that are always zero: any value decouples them, but damping must not see it
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    return torch.where(dead, mean, diagonal) + damping_fraction * mean


def _factor_(matrix: torch.Tensor) -> bool:
    """Factor by Cholesky from the last feature to the first, H = M·Mᵀ with M upper triangular, in
    the upper triangle.

    Returns whether the matrix was positive definite. Entries below the diagonal are neither read
    nor written.
    """
    size = matrix.shape[0]
    for start in reversed(range(0, size, _PANEL)):
        end = min(start + _PANEL, size)
        above, block = matrix[:start, start:end], matrix[start:end, start:end]
        left_alone = block.tril(-1)
        if end < size:  # panels to the right are finished: subtract their part
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
    """Return the symmetric matrix whose upper triangle is given."""
    upper = matrix.triu()
    return upper + upper.triu(1).T
