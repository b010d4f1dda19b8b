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


class CombinedProgress:
    """Shows all tasks of one description as one task, begun here: workers that share a job.

    What a worker did before it died is counted, and counted again when another one does it: the task ends at its total.

    Args:
        description: of the tasks that become one.
        total, done: of that one; the others' own are ignored.
    """

    def __init__(self, progress: Progress, description: str, total: int, done: int = 0) -> None:
        self._progress, self._description, self._left = progress, description, total - done
        self._advance_one = progress.start(description, total, done)

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """See `Progress.start`."""
        return self._advance if description == self._description else self._progress.start(description, total, done)

    def _advance(self) -> None:
        if self._left > 0:
            self._left -= 1
            self._advance_one()
