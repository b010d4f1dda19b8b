"""Whole tensors on a format's grid: groups, their scales and codes, and back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tempoquant.formats.format import Format, ScaleRule
from tempoquant.formats.levels import decode, encode, nearest_level
from tempoquant.formats.scales import group_scale, tensor_scale_of


@dataclass(frozen=True)
class WeightScale:
    """The scales of one weight, fixed before any of its elements is rounded.

    Attributes:
        group: (out, groups) float32 on the format's grid.
        tensor: () float32; 1 for formats without a tensor scale.
    """

    group: torch.Tensor
    tensor: torch.Tensor

    @property
    def effective(self) -> torch.Tensor:
        """Return the number that multiplies a level: (out, groups) float32."""
        return self.group * self.tensor


def group_amax(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Return largest magnitude of each group: (…, in) to (…, groups)."""
    return x.unflatten(-1, (-1, format.group_size)).abs().amax(-1)


def weight_scale(
    weight: torch.Tensor, format: Format, rule: ScaleRule, feature_weight: torch.Tensor | None = None
) -> WeightScale:
    """Compute the scales of a weight (out, in), float32; see `group_scale`.

    Args:
        feature_weight: (in,), the weight of a squared error in each column, for the rule
            "least_error"; None for 1.
    """
    amax = group_amax(weight, format).float()
    tensor = tensor_scale_of(amax, format) if format.has_tensor_scale else amax.new_ones(())

    def scale_of(candidate: float) -> torch.Tensor:
        return group_scale(amax, format, rule, candidate, tensor)

    if rule is not ScaleRule.LEAST_ERROR:
        return WeightScale(scale_of(1.0), tensor)
    return WeightScale(_scale_of_least_error(weight, format, scale_of, tensor, feature_weight), tensor)


def to_codes(x: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the nearest codes: (…, in) with scales (…, groups) to (…, in) int8."""
    grouped = x.unflatten(-1, (-1, format.group_size))
    return encode(grouped / scale.unsqueeze(-1), format).flatten(-2)


def from_codes(codes: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Return level times scale: (…, in) int8 with scales (…, groups) to (…, in) of the scale's
    dtype.
    """
    levels = decode(codes, format, scale.dtype).unflatten(-1, (-1, format.group_size))
    return (levels * scale.unsqueeze(-1)).flatten(-2)


def quantize_activation(
    x: torch.Tensor, format: Format, rule: ScaleRule, clip_ratio: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Round activations to four bits and back, with one dynamic scale per token and group (no
    tensor scale).

    Args:
        x: (…, in) float32 or float64, already smoothed.
        clip_ratio: a number, or a tensor broadcastable to (…, groups).

    Returns:
        (…, in), same dtype: exactly level times scale.
    """
    amax = group_amax(x, format)

    def scale_of(candidate: float) -> torch.Tensor:
        return group_scale(amax, format, rule, clip_ratio * candidate)

    scale = _scale_of_least_error(x, format, scale_of) if rule is ScaleRule.LEAST_ERROR else scale_of(1.0)
    per_feature = scale.unsqueeze(-1)
    return nearest_level(x.unflatten(-1, (-1, format.group_size)) / per_feature, format).mul_(per_feature).flatten(-2)


def _scale_of_least_error(
    x: torch.Tensor,
    format: Format,
    scale_of: Callable[[float], torch.Tensor],
    tensor_scale: torch.Tensor | float = 1.0,
    feature_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose for each group the format's candidate scale with the least squared rounding error.

    Four Over Six (arXiv 2512.02010) does this with two scales for NVFP4; the other formats'
    candidates are ours.

    The first of equal candidates wins. Errors are summed by halves (first half plus second half,
    until one number is left), so that every program that sums in this order makes the same choice.

    Args:
        x: (…, in).
        scale_of: returns the scales (…, groups) of a candidate.

    Returns:
        (…, groups).
    """
    grouped = x.unflatten(-1, (-1, format.group_size))
    weights = None if feature_weight is None else feature_weight.unflatten(-1, (-1, format.group_size))
    best_scale, best_error = None, None
    for candidate in format.scale_candidates:
        scale = scale_of(candidate)
        per_feature = (scale * tensor_scale).unsqueeze(-1)
        error = nearest_level(grouped / per_feature, format).mul_(per_feature).sub_(grouped).square_()
        if weights is not None:
            error *= weights
        while (half := error.shape[-1] // 2) > 0:
            error = error[..., :half] + error[..., half:]
        error = error.squeeze(-1)
        if best_scale is None or best_error is None:
            best_scale, best_error = scale, error
        else:
            is_better = error < best_error
            best_scale = torch.where(is_better, scale, best_scale)
            best_error = torch.where(is_better, error, best_error)
    assert best_scale is not None
    return best_scale
