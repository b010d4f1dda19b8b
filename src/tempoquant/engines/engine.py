"""Which workers there are, as plain values: an engine is chosen on the command line and opened where there is work."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tempoquant.engines.crew import Crew, InProcessCrew
from tempoquant.engines.processes import ProcessPool
from tempoquant.errors import SettingsError, UnsupportedError


class Engine(Protocol):
    """Where work runs.

    Attributes:
        device: a device as workers name it; all of them have the same type.
    """

    @property
    def device(self) -> str: ...

    def open(self, shared: Path) -> contextlib.AbstractContextManager[Crew]:
        """A crew, which is dismissed when the context is left.

        Args:
            shared: a folder that exists, which every worker has to see, since results lie there.

        Raises:
            TempoQuantError: it cannot be had; the message says what to do.
        """


@dataclass(frozen=True)
class Local:
    """This machine: this process for one device, a process for each of several.

    Raises:
        SettingsError: there is no device, or they are of different types, whose results would differ.
    """

    devices: tuple[str, ...]

    def __post_init__(self) -> None:
        if len({torch.device(device).type for device in self.devices}) != 1:
            raise SettingsError(f"give one or more devices of one type, not {', '.join(self.devices)!r}.")

    @property
    def device(self) -> str:
        """The first one."""
        return self.devices[0]

    @contextlib.contextmanager
    def open(self, shared: Path) -> Iterator[Crew]:
        """See `Engine.open`."""
        if len(self.devices) == 1:
            yield InProcessCrew(self.device)
            return
        pool = ProcessPool(self.devices)
        try:
            yield pool
        finally:
            pool.shut_down()


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster that runs already: a worker for each of its GPUs, or on "cpu" one for each of its machines.

    Attributes:
        device: "cuda" or "cpu".
        address: HOST:PORT, as `ray start` printed it; None for the cluster that this machine belongs to.

    Raises:
        SettingsError: the device names one GPU, which only Ray can choose.
    """

    device: str
    address: str | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cuda", "cpu"):
            raise SettingsError(f"Ray gives each worker a GPU of its own: say cuda or cpu, not {self.device!r}.")

    @contextlib.contextmanager
    def open(self, shared: Path) -> Iterator[Crew]:
        """See `Engine.open`. Raises UnsupportedError when Ray is not installed."""
        try:
            from tempoquant.engines.ray_cluster import ray_crew
        except ImportError as error:
            raise UnsupportedError(
                f"Ray is not usable here ({error}): pip install 'tempoquant[ray]' on every machine."
            ) from error

        with ray_crew(self.address, self.device, shared) as crew:
            yield crew
