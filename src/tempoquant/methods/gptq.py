"""GPTQ (arXiv 2210.17323): round a weight column by column, each error pushed onto the columns not yet rounded."""

from typing import NamedTuple

import torch

from tempoquant.errors import HessianError
from tempoquant.formats import Format, WeightScale, decode, encode


class HessianAccumulator:
    """The mean of xᵀx over tokens, gathered a batch at a time.

    Args:
        in_features: width of the input.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in tokens: (…, in), any float dtype."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self._sum.addmm_(rows.T, rows)
        self.num_tokens += rows.shape[0]

    @property
    def hessian(self) -> torch.Tensor:
        """(in, in) float32. Raises HessianError before any token has come."""
        if self.num_tokens == 0:
            raise HessianError("the Hessian has seen no token: give calibration inputs.")
        return self._sum / self.num_tokens


class GptqResult(NamedTuple):
    """codes: (out, in) int8. needed_float64: whether the Hessian was positive definite in float64 only."""

    codes: torch.Tensor
    needed_float64: bool


def gptq(
    residual_weight: torch.Tensor,
    hessian: torch.Tensor,
    scale: WeightScale,
    format: Format,
    damping_fraction: float = 0.01,
    block_size: int = 128,
) -> GptqResult:
    """Round a weight so that the error it makes on inputs of this Hessian is small.

    Args:
        residual_weight: (out, in) float32 or float64; not changed.
        hessian: (in, in), mean of xᵀx of the input the layer really sees (smoothed and quantized).
        scale: fixed before; GPTQ only chooses codes.
        damping_fraction: added to the diagonal, as a fraction of its mean.
        block_size: columns between lazy updates; speed, never the result.

    Raises:
        HessianError: the damped Hessian is not positive definite, not even in float64.
    """
    factor, needed_float64 = _inverse_factor(hessian.to(residual_weight.dtype), damping_fraction)
    weight = residual_weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    column_scale = scale.effective.to(weight.dtype).repeat_interleave(format.group_size, dim=1)
    for start in range(0, weight.shape[1], block_size):
        end = min(start + block_size, weight.shape[1])
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            codes[:, column] = encode(weight[:, column] / column_scale[:, column], format)
            rounded = decode(codes[:, column], format, weight.dtype) * column_scale[:, column]
            error = (weight[:, column] - rounded) / factor[column, column]
            weight[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
            errors[:, column - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return GptqResult(codes, needed_float64)


def _inverse_factor(hessian: torch.Tensor, damping_fraction: float) -> tuple[torch.Tensor, bool]:
    """U with UᵀU = (H + damping)⁻¹, upper triangular: row i holds how an error in column i spreads to later ones."""
    if not bool(torch.isfinite(hessian).all()):
        raise HessianError("the Hessian holds NaN or Inf: the calibration inputs are not finite.")
    damped = hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0  # features that are always zero: any value decouples them, but damping must not feel it
    mean = diagonal[~dead].mean() if bool((~dead).any()) else diagonal.new_ones(())
    diagonal[dead] = mean
    diagonal += damping_fraction * mean
    for dtype in dict.fromkeys((damped.dtype, torch.float64)):
        try:
            lower = torch.linalg.cholesky(damped.to(dtype))
            upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        except torch.linalg.LinAlgError:
            continue
        return upper.to(hessian.dtype), dtype != hessian.dtype
    raise HessianError(
        f"the Hessian of {hessian.shape[0]} features is not positive definite, not even in float64 with damping "
        f"{damping_fraction}: calibrate on more tokens, or raise damping_fraction."
    )
