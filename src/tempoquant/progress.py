"""How long jobs report progress without knowing who watches: the CLI shows a bar with ETA, a library call nothing."""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Something that shows how far a job is. Several tasks may be under way at once, from several threads."""

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task of `total` units; the returned function is called once for each finished unit.

        Args:
            done: units that an earlier run finished. They are shown as done, and say nothing about the speed.
        """


class Silent:
    """Shows nothing."""

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """See `Progress.start`."""
        return lambda: None


SILENT = Silent()
