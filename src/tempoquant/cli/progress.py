"""Progress on stderr: bars with the time that is left on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tempoquant.progress import Progress as ProgressLike

SECONDS_BETWEEN_LINES = 20.0
SPEED_WINDOW_S = 120.0
"""Rich estimates the time left from this much of the past: layers and steps are uneven, so a short window jumps."""


class RichProgress:
    """Implements `tempoquant.progress.Progress`. A context manager: leaving it clears the bars, however it is left."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._is_live = self._console.is_terminal
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=SPEED_WINDOW_S,
            transient=True,
        )

    def __enter__(self) -> "RichProgress":
        if self._is_live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_live:
            self._bars.stop()

    def start(self, description: str, total: int) -> Callable[[], None]:
        """See `tempoquant.progress.Progress.start`. A finished task leaves one line that says how long it took."""
        return self._start_bar(description, total) if self._is_live else self._start_lines(description, total)

    def _start_bar(self, description: str, total: int) -> Callable[[], None]:
        task: TaskID = self._bars.add_task(description, total=total)
        started = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._bars.advance(task)
            if done == total:
                self._bars.remove_task(task)
                self._say(f"{description}: done in {_duration(time.monotonic() - started)}")

        return advance

    def _start_lines(self, description: str, total: int) -> Callable[[], None]:
        started = last_line = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, last_line
            done += 1
            now = time.monotonic()
            if done == total:
                self._say(f"{description}: done in {_duration(now - started)}")
            elif now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                left = (now - started) / done * (total - done)
                self._say(f"{description}: {done} of {total}, about {_duration(left)} left")

        return advance

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Labelled:
    """Passes progress on with a label before each description: which of several models the work is for."""

    def __init__(self, progress: ProgressLike, label: str) -> None:
        self._progress = progress
        self._label = label

    def start(self, description: str, total: int) -> Callable[[], None]:
        """See `tempoquant.progress.Progress.start`."""
        return self._progress.start(f"{self._label}: {description}", total)


def _duration(seconds: float) -> str:
    """Such as "41 s" or "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
