"""How long jobs report progress without knowing who watches: the CLI shows a bar with ETA, a library call nothing."""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Something that shows how far a job is."""

    def start(self, description: str, total: int) -> Callable[[], None]:
        """Begin a task of `total` units; the returned function is called once for each finished unit."""


class Silent:
    """Shows nothing."""

    def start(self, description: str, total: int) -> Callable[[], None]:
        """See `Progress.start`."""
        return lambda: None


SILENT = Silent()
