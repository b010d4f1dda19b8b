"""Progress of long jobs, reported to an observer that the job does not know: the CLI shows a bar
with ETA, a library call nothing.
"""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """An observer that shows how far a job is. Several tasks may run at once, in several
    threads.
    """

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task of `total` units; the caller calls the returned function once for each
        finished unit.

        Args:
            done: units that an earlier run finished. They are shown as done, and do not count
                towards the speed.
        """


class Silent:
    """A `Progress` that shows nothing."""

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task that nobody sees; see `Progress.start`."""
        return lambda: None


SILENT = Silent()


class CombinedProgress:
    """Shows all tasks of one description as one: the shared job of several workers.

    If a worker dies, its units are counted, and counted again when another worker repeats them; the
    task ends at its total.

    Args:
        description: of the tasks that become one.
        total, done: of the common task; those of the single tasks are ignored.
    """

    def __init__(self, progress: Progress, description: str, total: int, done: int = 0) -> None:
        self._progress, self._description, self._left = progress, description, total - done
        self._advance_one = progress.start(description, total, done)

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task, or continue the common one; see `Progress.start`."""
        return self._advance if description == self._description else self._progress.start(description, total, done)

    def _advance(self) -> None:
        if self._left > 0:
            self._left -= 1
            self._advance_one()
