"""The available workers, as plain values: an engine is chosen on the command line and opened when
there is work.
"""

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
    """A place where work runs.

    Attributes:
        device: the name of a device on the workers; all have the same type.
    """

    @property
    def device(self) -> str: ...

    def open(self, shared: Path) -> contextlib.AbstractContextManager[Crew]:
        """Open a crew, which is dismissed at the end of the context.

        Args:
            shared: an existing folder that every worker must see, since results go there.

        Raises:
            TempoQuantError: no crew is available; the message says what to do.
        """


@dataclass(frozen=True)
class Local:
    """This machine: this process for one device, one process each for several.

    Raises:
        SettingsError: there is no device, or they are of different types, whose results would
            differ.
    """

    devices: tuple[str, ...]

    def __post_init__(self) -> None:
        if len({torch.device(device).type for device in self.devices}) != 1:
            raise SettingsError(f"give one or more devices of one type, not {', '.join(self.devices)!r}.")

    @property
    def device(self) -> str:
        """Return the first device."""
        return self.devices[0]

    @contextlib.contextmanager
    def open(self, shared: Path) -> Iterator[Crew]:
        """Open a crew; see `Engine.open`."""
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
    """A running Ray cluster: a worker for each of its GPUs, or on "cpu" one for each of its
    machines.

    Attributes:
        device: "cuda" or "cpu".
        address: HOST:PORT, as `ray start` printed it; None for the cluster that this machine
            belongs to.

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
        """Open a crew; see `Engine.open`. Raises UnsupportedError if Ray is not installed."""
        try:
            from tempoquant.engines.ray_cluster import ray_crew
        except ImportError as error:
            raise UnsupportedError(
                f"Ray is not usable here ({error}): pip install 'tempoquant[ray]' on every machine."
            ) from error

        with ray_crew(self.address, self.device, shared) as crew:
            yield crew
