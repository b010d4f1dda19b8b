"""SamplingSettings: how one video is sampled."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tempoquant.errors import SettingsError


@dataclass(frozen=True)
class SamplingSettings:
    """How one video is sampled.

    Which sizes and lengths a model can run is its family's to say: `LatentGeometry.require`.

    Attributes:
        height, width: pixels.
        num_frames: of the video.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance, all denoisers; 1 for none.
        flow_shift: of the scheduler; None keeps the one stored in the pipeline.
        fps: frames a second of the written video.

    Raises:
        SettingsError: a value that no model can run.
    """

    height: int
    width: int
    num_frames: int
    num_steps: int
    guidance_scale: float
    flow_shift: float | None
    fps: int

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "num_steps", "fps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SettingsError(f"{name} is a whole number above 0, not {value!r}.")
        for name in ("guidance_scale", "flow_shift"):
            value = getattr(self, name)
            if value is None and name == "flow_shift":
                continue
            if not isinstance(value, int | float) or not 0 < value < 1e6:
                raise SettingsError(f"{name} is a number above 0, not {value!r}.")

    def replace(self, **changes: Any) -> "SamplingSettings":
        """Return a copy with some settings changed; None leaves a setting as it is."""
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})
