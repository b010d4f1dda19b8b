"""Scales: from a group's largest magnitude to a number on the format's grid, and to the stored
bytes.

The stored scale is the scale used: every function here returns numbers that storage does not
change. A group of zeros has scale 1. A group that holds NaN or Inf has scale NaN, so that bad
activations stay visible in the output.
"""

import math

import torch

from tempoquant.errors import CheckpointError
from tempoquant.formats.format import Format, ScaleGrid, ScaleRule

E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest positive e4m3, a subnormal
E4M1_MAX = 384.0
E4M1_MIN = 2.0**-8  # below it e4m3 holds no 1.5·2^e
_E8M0_BIAS = 127


def tensor_scale_of(amax: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the float32 scale of a weight tensor: it maps the largest magnitude to the top level
    times the largest E4M3.

    In E4M1 it maps it to the top level times 256, so that the candidate 1.5 fits the group that
    holds it.

    Args:
        amax: (out, groups) float32, largest magnitude of each group.

    Returns:
        () float32, 1 for an all-zero tensor. Source: NVFP4, as in NVIDIA ModelOpt.
    """
    largest = amax.max().float()
    top = E4M3_MAX if format.scale_grid is ScaleGrid.E4M3 else E4M1_MAX / 1.5
    return torch.where(largest > 0, largest / (format.top_level * top), torch.ones_like(largest))


def group_scale(
    amax: torch.Tensor,
    format: Format,
    rule: ScaleRule,
    clip_ratio: torch.Tensor | float = 1.0,
    tensor_scale: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Compute the scale of each group, on the format's grid.

    Args:
        amax: (…, groups) float32 or float64, largest magnitude of each group; all groups of a row.
        rule: "least_error" is "ceil" here; `quantize_activation` and `weight_scale` try its
            candidates.
        clip_ratio: multiplies amax first; broadcastable to amax.
        tensor_scale: for scales of weights, what the group scale is later multiplied by.

    Returns:
        same shape and dtype as amax; for formats with a tensor scale *without* it.
    """
    clipped = (amax * clip_ratio).clamp(max=torch.finfo(amax.dtype).max)  # a clip ratio above 1 may overflow
    scale = _on_grid(clipped, format, rule, tensor_scale)
    if format.scale_octaves is not None:
        scale = scale.maximum(_largest_of_row(clipped, format, rule, tensor_scale) * 2.0**-format.scale_octaves)
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    return torch.where(torch.isfinite(amax), scale, torch.full_like(scale, torch.nan))


def _largest_of_row(
    amax: torch.Tensor, format: Format, rule: ScaleRule, tensor_scale: torch.Tensor | float
) -> torch.Tensor:
    """Return the scale of a row's largest magnitude under the largest candidate: (…, 1)."""
    candidates = format.scale_candidates if rule is ScaleRule.LEAST_ERROR else (1.0,)
    largest = amax.amax(-1, keepdim=True) * max(candidates)
    return _on_grid(largest.clamp(max=torch.finfo(amax.dtype).max), format, rule, tensor_scale)


def _on_grid(amax: torch.Tensor, format: Format, rule: ScaleRule, tensor_scale: torch.Tensor | float) -> torch.Tensor:
    """Round the scale of a largest magnitude to the format's grid."""
    if format.scale_grid is ScaleGrid.E8M0:
        return _power_of_two_scale(amax, format, rule)
    wanted = amax / format.top_level / tensor_scale
    if format.scale_grid is ScaleGrid.E4M3:
        return wanted.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).to(amax.dtype)
    if format.scale_grid is ScaleGrid.E4M1:
        mantissa, exponent = torch.frexp(wanted.clamp(E4M1_MIN, E4M1_MAX))  # in [0.5, 1): quarters are one mantissa bit
        return torch.ldexp((mantissa * 4).round() / 4, exponent)
    grid = torch.finfo(torch.bfloat16)
    return wanted.clamp(grid.tiny, grid.max).to(torch.bfloat16).to(amax.dtype)


def _power_of_two_scale(amax: torch.Tensor, format: Format, rule: ScaleRule) -> torch.Tensor:
    """Return 2^e by the floor or the ceil rule; the exponents come from the float itself, so that
    no logarithm rounds.
    """
    # amax = m·2^e and top level = n·2^f with m, n in [0.5, 1): comparing m with n gives log2(amax /
    # top level) without a division, which would round, and lose subnormals.
    mantissa, exponent = torch.frexp(amax)
    top_mantissa, top_exponent = math.frexp(format.top_level)
    exponent = exponent - top_exponent
    if rule is not ScaleRule.FLOOR:
        exponent = torch.where(mantissa > top_mantissa, exponent + 1, exponent)
    # −126 keeps every scale a normal float32, so that flush-to-zero devices agree with the CPU.
    return torch.ldexp(torch.ones_like(amax), exponent.clamp(-126, 127))


def scale_to_bytes(scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Convert scales on the grid to bytes: (rows, groups) to (rows, groups · bytes per scale)
    uint8.
    """
    if format.scale_grid is ScaleGrid.E8M0:
        _, exponent = torch.frexp(scale)
        return (exponent - 1 + _E8M0_BIAS).to(torch.uint8)
    dtype = torch.float8_e4m3fn if format.scale_grid.is_e4m3 else torch.bfloat16
    return scale.to(dtype).contiguous().view(torch.uint8)


def scale_from_bytes(stored: torch.Tensor, format: Format) -> torch.Tensor:
    """Convert bytes to scales as float32, the inverse of `scale_to_bytes`."""
    if format.scale_grid is ScaleGrid.E8M0:
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - _E8M0_BIAS)
    dtype = torch.float8_e4m3fn if format.scale_grid.is_e4m3 else torch.bfloat16
    return stored.contiguous().view(dtype).float()


def check_scale_bytes(stored: torch.Tensor, format: Format, where: str) -> None:
    """Raise CheckpointError if a stored scale is NaN, infinite, zero or negative, or not on the
    format's grid.
    """
    scale = scale_from_bytes(stored, format)
    is_nan_code = (stored == 255).any() if format.scale_grid is ScaleGrid.E8M0 else False
    if is_nan_code or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(
            f"{where} holds a scale that is not a positive number: the file is damaged, fetch it again."
        )
    if not _is_of_format(scale, format):
        raise CheckpointError(f"{where} holds a scale off the {format.name} grid: the file is damaged, fetch it again.")


def _is_of_format(scale: torch.Tensor, format: Format) -> bool:
    mantissa, exponent = torch.frexp(scale)
    if format.scale_grid is ScaleGrid.E4M1 and not bool(
        ((mantissa * 4).frac() == 0).all() and (scale >= E4M1_MIN).all()
    ):
        return False
    # A group of zeros has scale 1, which is always on the grid: its smallest number is 2^-8.
    spread = exponent.amax(-1) - exponent.amin(-1)
    return format.scale_octaves is None or bool((spread <= format.scale_octaves).all())
