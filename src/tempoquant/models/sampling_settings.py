"""SamplingSettings: the sampling of one video."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tempoquant.errors import SettingsError


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of one video's sampling.

    The family decides which sizes and lengths a model can run: `LatentGeometry.require`.

    Attributes:
        height, width: pixels.
        num_frames: of the video.
        num_steps: of the sampler.
        guidance_scale: of guidance, all denoisers; 1 for none, except in pipelines that count from
            0.
        flow_shift: of the scheduler; None keeps the one stored in the pipeline.
        fps: frames a second of the written video.
        sigmas: noise's share of the latents before each step, falling, as in a distilled model's
            training; None for the scheduler's own.

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
    sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "num_steps", "fps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SettingsError(f"{name} is a whole number above 0, not {value!r}.")
        for name in ("guidance_scale", "flow_shift"):
            value = getattr(self, name)
            if value is None and name == "flow_shift":
                continue
            may_be_0 = name == "guidance_scale"  # of models that count from 0 what others count from 1
            if not isinstance(value, int | float) or not 0 <= value < 1e6 or (value == 0 and not may_be_0):
                raise SettingsError(f"{name} is a number {'of at least' if may_be_0 else 'above'} 0, not {value!r}.")
        self._check_sigmas()

    def _check_sigmas(self) -> None:
        if self.sigmas is None:
            return
        falling = sorted({*self.sigmas}, reverse=True)
        if not all(0 < sigma <= 1 for sigma in self.sigmas) or list(self.sigmas) != falling:
            raise SettingsError(f"sigmas fall and lie in 0 … 1, not {list(self.sigmas)}.")
        if len(self.sigmas) != self.num_steps:
            raise SettingsError(
                f"num_steps is {len(self.sigmas)}, one for each of the model's sigmas, not {self.num_steps}: change "
                "both in sampling.json, or set sigmas to null there."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], defaults: "SamplingSettings | None" = None) -> "SamplingSettings":
        """Make settings from plain JSON values, the inverse of `to_dict`; missing ones are those of
        `defaults`.

        Raises TypeError for an unknown or missing name, and SettingsError.
        """
        given = {**({} if defaults is None else vars(defaults)), **values}
        sigmas = given.get("sigmas")
        return cls(**{**given, "sigmas": None if sigmas is None else tuple(sigmas)})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; without sigmas if the scheduler has its own."""
        values = dataclasses.asdict(self)
        sigmas = values.pop("sigmas")
        return values if sigmas is None else {**values, "sigmas": list(sigmas)}

    def replace(self, **changes: Any) -> "SamplingSettings":
        """Return a copy with some settings changed; None leaves a setting unchanged."""
        return dataclasses.replace(self, **{key: value for key, value in changes.items() if value is not None})
