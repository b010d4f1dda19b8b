"""Inputs of a denoiser on its compute device, and in its compute dtype."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tempoquant.models.family import ModelFamily


def on_device(
    denoiser: nn.Module,
    family: ModelFamily,
    inputs: Mapping[str, Any],
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Return inputs on the denoiser's device, floats in its dtype except for times and positions.

    Args:
        inputs: arguments of a call by name.
        device: None for that of its weights. In a memory mode that may be host memory, while it
            computes elsewhere.
    """
    weight = _first_weight(denoiser, family)
    exact = {family.timestep_argument, *family.exact_inputs}

    def moved(is_cast: bool, value: torch.Tensor) -> torch.Tensor:
        dtype = weight.dtype if is_cast and value.is_floating_point() else value.dtype
        return value.to(device or weight.device, dtype)

    return {
        key: pytree.tree_map_only(torch.Tensor, functools.partial(moved, key not in exact), value)
        for key, value in inputs.items()
    }


def _first_weight(denoiser: nn.Module, family: ModelFamily) -> nn.Parameter:
    """Return a weight outside the blocks that is not kept in float32: its dtype is the
    denoiser's.
    """
    in_float32 = set(getattr(denoiser, "_keep_in_fp32_modules", None) or [])
    return next(
        parameter
        for name, parameter in denoiser.named_parameters()
        if parameter.is_floating_point() and family.block_of(name) is None and not in_float32 & {*name.split(".")}
    )
