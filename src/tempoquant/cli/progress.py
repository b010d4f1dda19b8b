"""Progress on stderr: bars with the remaining time on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from tempoquant.progress import Progress as ProgressLike

SECONDS_BETWEEN_LINES = 20.0


class Pace:
    """The speed of a task, from all units that this run finished.

    Units are uneven (a block's forward passes, then its linears), and repeat in the same order. The
    mean over all of them is right after each round; a window over the latest ones would follow
    their kind.

    Attributes:
        total: units of the task.
        done: units finished, those of earlier runs included.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done = total, done
        self._done_before = done
        self._started = self._latest = time.monotonic()

    def advance(self) -> None:
        """Record that one more unit is finished."""
        self.done += 1
        self._latest = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Return the seconds since the task began in this run."""
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float | None:
        """Return the seconds until the end, at the mean speed so far; None before the first unit of
        this run.
        """
        num_timed = self.done - self._done_before
        if not num_timed:
            return None
        per_unit = (self._latest - self._started) / num_timed
        return max(0.0, per_unit * (self.total - self.done) - (time.monotonic() - self._latest))


class RichProgress:
    """Implements `tempoquant.progress.Progress`. It is a context manager that clears the bars on
    every exit.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._is_live = self._console.is_terminal
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeftColumn(),
            console=self._console,
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

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task; see `tempoquant.progress.Progress.start`. A finished task leaves one line
        with its duration.
        """
        if done >= total:
            if total:
                self._say(f"{description}: was done already")
            return lambda: None
        begin = self._start_bar if self._is_live else self._start_lines
        return begin(description, Pace(total, done))

    def _start_bar(self, description: str, pace: Pace) -> Callable[[], None]:
        task: TaskID = self._bars.add_task(description, total=pace.total, completed=pace.done, pace=pace)

        def advance() -> None:
            pace.advance()
            self._bars.advance(task)
            if pace.done == pace.total:
                self._bars.remove_task(task)
                self._say(f"{description}: done in {duration_text(pace.elapsed_s)}")

        return advance

    def _start_lines(self, description: str, pace: Pace) -> Callable[[], None]:
        last_line = time.monotonic()
        if pace.done:
            self._say(f"{description}: {pace.done} of {pace.total} were already done")

        def advance() -> None:
            nonlocal last_line
            pace.advance()
            now = time.monotonic()
            if pace.done == pace.total:
                self._say(f"{description}: done in {duration_text(pace.elapsed_s)}")
            elif now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                left = duration_text(pace.left_s or 0.0)
                self._say(f"{description}: {pace.done} of {pace.total}, about {left} left")

        return advance

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _TimeLeftColumn(ProgressColumn):
    """The remaining time at a task's own pace; rich would estimate it from its latest units
    alone.
    """

    def render(self, task: Task) -> Text:
        left_s = task.fields["pace"].left_s
        return Text("" if left_s is None else f"about {duration_text(left_s)} left", style="progress.remaining")


class Labelled:
    """Forwards progress with a label before each description, which names one of several models."""

    def __init__(self, progress: ProgressLike, label: str) -> None:
        self._progress = progress
        self._label = label

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task; see `tempoquant.progress.Progress.start`."""
        return self._progress.start(f"{self._label}: {description}", total, done)


def duration_text(seconds: float) -> str:
    """Write a duration such as "41 s", "3 min 20 s" or "5 h 12 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
