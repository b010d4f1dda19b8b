"""ComfyLayout: settings of ComfyUI's own class for a family's denoisers; tensors have their
original names there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ComfyLayout:
    """The facts of a family's denoisers inside ComfyUI.

    Attributes:
        settings: the `unet_config` that ComfyUI's classes take, from a denoiser's config.json;
            raises ModelError for a denoiser that ComfyUI's class does not cover, KeyError for an
            incomplete config.
        timestep_argument: the name of the timestep, 0 clean … 1000 noise, in the forward of
            ComfyUI's class.
        in_float32: modules, by ComfyUI's names, whose weights its class keeps in float32 in every
            dtype.
    """

    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    timestep_argument: str = "timestep"
    in_float32: frozenset[str] = frozenset()
