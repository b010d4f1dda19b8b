"""ComfyLayout: settings of ComfyUI's own class for a family's denoisers; tensors have their original names there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ComfyLayout:
    """Facts of a family's denoisers inside ComfyUI.

    Attributes:
        settings: the `unet_config` that ComfyUI's classes take, from a denoiser's config.json; raises ModelError for a
            denoiser that ComfyUI's class cannot be, KeyError for a config that lacks something.
        timestep_argument: what the forward of ComfyUI's class calls its timestep, 0 clean … 1000 noise.
        in_float32: modules, by ComfyUI's names, whose weights its class keeps in float32 in every dtype.
    """

    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    timestep_argument: str = "timestep"
    in_float32: frozenset[str] = frozenset()
