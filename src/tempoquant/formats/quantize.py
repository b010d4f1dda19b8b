"""Whole tensors on a format's grid: groups, their scales, their codes, and back."""

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
        """(out, groups) float32: what a level is multiplied by."""
        return self.group * self.tensor


def group_amax(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Largest magnitude of each group: (…, in) to (…, groups)."""
    return x.unflatten(-1, (-1, format.group_size)).abs().amax(-1)


def weight_scale(weight: torch.Tensor, format: Format, rule: ScaleRule) -> WeightScale:
    """The scales of a weight (out, in), float32; see `group_scale`."""
    amax = group_amax(weight, format).float()
    tensor = tensor_scale_of(amax, format) if format.has_tensor_scale else amax.new_ones(())
    return WeightScale(group_scale(amax, format, rule, tensor_scale=tensor), tensor)


def to_codes(x: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Nearest codes: (…, in) with scales (…, groups) to (…, in) int8."""
    grouped = x.unflatten(-1, (-1, format.group_size))
    return encode(grouped / scale.unsqueeze(-1), format).flatten(-2)


def from_codes(codes: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Level times scale: (…, in) int8 with scales (…, groups) to (…, in) of the scale's dtype."""
    levels = decode(codes, format, scale.dtype).unflatten(-1, (-1, format.group_size))
    return (levels * scale.unsqueeze(-1)).flatten(-2)


def quantize_activation(
    x: torch.Tensor, format: Format, rule: ScaleRule, clip_ratio: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Round activations to four bits and back, with one dynamic scale per token and group (no tensor scale).

    Args:
        x: (…, in) float32 or float64, already smoothed.
        clip_ratio: a number, or a tensor broadcastable to (…, groups).

    Returns:
        (…, in), same dtype: exactly level times scale.
    """
    scale = group_scale(group_amax(x, format), format, rule, clip_ratio)
    per_feature = scale.unsqueeze(-1)
    return nearest_level(x.unflatten(-1, (-1, format.group_size)) / per_feature, format).mul_(per_feature).flatten(-2)
