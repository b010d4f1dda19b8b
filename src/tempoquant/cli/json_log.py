"""Progress for programs: one JSON object a line, in a file that another program can follow during
the run.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer

from tempoquant.cli.progress import Pace
from tempoquant.errors import OutputError
from tempoquant.progress import Progress

SECONDS_BETWEEN_ADVANCES = 1.0

JsonLogFile = Annotated[
    Path | None,
    typer.Option("--json-log", metavar="FILE", help="Append progress to this file, one JSON object a line."),
]

_logger = logging.getLogger(__name__)


class JsonLog:
    """Implements `tempoquant.progress.Progress`: forwards progress, and appends a line for each
    event to a file.

    Every line has "time_s" since the log was opened, "event" and "rss_gib" (memory in use; null if
    the system does not tell). The events "start", "advance" and "done" have "stage", "done",
    "total" and "eta_s", the remaining seconds at the pace of this run's units (null before the
    first); "note" has "text". Advances come at most about once a second and task; the other events
    always. It is a context manager: leaving it by an error notes the error.

    Args:
        progress: receives all progress as well.
        file: appended to; created if need be.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, progress: Progress, file: Path) -> None:
        self._progress = progress
        self._file = file
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._is_broken = False
        try:
            self._stream = file.open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"the log {file} cannot be written ({error.strerror or error}): give --json-log another file."
            ) from error

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.note(f"ended by {type(error).__name__}: {error}".removesuffix(": "))
        self._stream.close()

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task; see `tempoquant.progress.Progress.start`."""
        pass_on = self._progress.start(description, total, done)
        pace = Pace(total, done)
        last_line = -SECONDS_BETWEEN_ADVANCES
        self._write_task("start", description, pace)
        if done >= total:
            self._write_task("done", description, pace)

        def advance() -> None:
            nonlocal last_line
            pace.advance()
            now = time.monotonic()
            is_done = pace.done == pace.total
            if is_done or now - last_line >= SECONDS_BETWEEN_ADVANCES:
                last_line = now
                self._write_task("done" if is_done else "advance", description, pace)
            pass_on()

        return advance

    def note(self, text: str) -> None:
        """Append a message."""
        self._write({"event": "note", "text": text})

    def _write_task(self, event: str, stage: str, pace: Pace) -> None:
        left_s = 0.0 if pace.done >= pace.total else pace.left_s
        eta_s = None if left_s is None else round(left_s, 1)
        self._write({"event": event, "stage": stage, "done": pace.done, "total": pace.total, "eta_s": eta_s})

    def _write(self, record: dict[str, Any]) -> None:
        """Write a record. If the log breaks, for example on a full disk, it stops with a warning,
        and the run goes on.
        """
        rss = rss_gib()
        line = {"time_s": round(time.monotonic() - self._started, 3), **record, "rss_gib": rss and round(rss, 3)}
        with self._lock:
            if self._is_broken:
                return
            try:
                self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                self._stream.flush()
            except OSError as error:
                self._is_broken = True
                _logger.warning("the log %s ends here: %s", self._file, error.strerror or error)


def rss_gib() -> float | None:
    """Return this process's memory in use, GiB, mapped files included; None if the system does not
    tell.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
