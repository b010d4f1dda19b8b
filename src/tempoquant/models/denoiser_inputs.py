"""Inputs of a denoiser where it computes, and in the dtype that it computes in."""

from collections.abc import Mapping

import torch
from torch import nn

from tempoquant.models.family import ModelFamily


def on_device(
    denoiser: nn.Module,
    family: ModelFamily,
    inputs: Mapping[str, torch.Tensor],
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:
    """Return inputs where the denoiser computes, floats but for the timestep in the dtype that it computes in.

    Args:
        device: None for where its weights are. In a memory mode that may be host memory, while it computes elsewhere.
    """
    weight = _first_weight(denoiser, family)
    moved = {key: value.to(device or weight.device) for key, value in inputs.items()}
    casts = {key for key, value in moved.items() if value.is_floating_point() and key != family.timestep_argument}
    return {key: value.to(weight.dtype) if key in casts else value for key, value in moved.items()}


def _first_weight(denoiser: nn.Module, family: ModelFamily) -> nn.Parameter:
    """Return a weight that lies in no block and is not kept in float32: its dtype is the denoiser's."""
    in_float32 = set(getattr(denoiser, "_keep_in_fp32_modules", None) or [])
    return next(
        parameter
        for name, parameter in denoiser.named_parameters()
        if parameter.is_floating_point() and family.block_of(name) is None and not in_float32 & {*name.split(".")}
    )
