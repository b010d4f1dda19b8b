"""A pipeline's timesteps as numbers of the host, read from the device once for a video and not at
every call.
"""

from collections.abc import Mapping
from typing import Any

import torch

from tempoquant.models.family import ModelFamily


class HostTimesteps:
    """Reads the timesteps of a pipeline's scheduler, and tells which one a denoiser is called with.

    Reading a number makes the host wait until the GPU has done all that was launched. A pipeline
    passes on an element of `scheduler.timesteps`, so its place in that memory tells its value.
    """

    def __init__(self, pipeline: Any, family: ModelFamily) -> None:
        self._pipeline, self._family = pipeline, family
        self._read: tuple[torch.Tensor, int] | None = None
        self._schedule: list[float] = []
        self._timesteps: list[float] = []

    def schedule(self) -> list[float]:
        """Return the scheduler's timesteps in its own order and unit; none before they are set."""
        timesteps = getattr(self._pipeline.scheduler, "timesteps", None)
        if not isinstance(timesteps, torch.Tensor):
            return [] if timesteps is None else [float(each) for each in timesteps]
        self._read_once(timesteps)
        return self._schedule

    def of(self, inputs: Mapping[str, Any]) -> float:
        """Return the timestep of a denoiser's call, as `ModelFamily.timestep_of` does."""
        told = inputs.get(self._family.timestep_argument)
        timesteps = getattr(self._pipeline.scheduler, "timesteps", None)
        if isinstance(timesteps, torch.Tensor) and isinstance(told, torch.Tensor):
            place = _place_in(timesteps, told)
            if place is not None:
                self._read_once(timesteps)
                return self._timesteps[place]
        return self._family.timestep_of(inputs)

    def _read_once(self, timesteps: torch.Tensor) -> None:
        """Read them anew where the scheduler has others than before."""
        version = 0 if timesteps.is_inference() else timesteps._version
        if self._read is None or self._read[0] is not timesteps or self._read[1] != version:
            numbers = timesteps.detach().cpu()
            self._read, self._schedule = (timesteps, version), numbers.tolist()
            name = self._family.timestep_argument
            self._timesteps = [self._family.timestep_of({name: each}) for each in numbers]


def _place_in(timesteps: torch.Tensor, told: torch.Tensor) -> int | None:
    """Return which of `timesteps` (steps,) all of `told` is, by its address; None for none."""
    steps = zip(told.stride(), told.shape, strict=True)
    if told.numel() == 0 or any(step and size > 1 for step, size in steps) or timesteps.dim() != 1:
        return None
    if (told.dtype, told.device) != (timesteps.dtype, timesteps.device) or told.is_meta:
        return None
    if told.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    offset = int(told.storage_offset()) - int(timesteps.storage_offset())
    place, beyond = divmod(offset, timesteps.stride(0) or 1)
    return place if not beyond and 0 <= place < len(timesteps) else None
