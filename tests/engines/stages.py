"""Stages for tests: what their items do is in the items."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempoquant.errors import CalibrationError
from tempoquant.progress import Progress


@dataclass(frozen=True)
class Acting:
    """Each item is a word and a file name; a line in `folder` / log.txt says which process opened
    and began what.

    An item that waits is done when what it waits for has happened: "await" for the file, "meet" for
    as many processes as its name says to have opened the stage.
    """

    folder: Path

    def note(self, *words: Any) -> None:
        with (self.folder / "log.txt").open("a") as stream:
            stream.write(" ".join(map(str, (os.getpid(), *words))) + "\n")

    @contextlib.contextmanager
    def open(self, device: str, progress: Progress) -> Iterator[Callable[[Any], Any]]:
        self.note("open", device)
        yield lambda item: self.act(progress, *item)
        self.note("close")

    def act(self, progress: Progress, action: str, name: str) -> str:
        self.note("begin", action, name)
        advance = progress.start("steps", 3)
        for _ in range(3):
            advance()
        file = self.folder / name
        if action == "await":
            wait_until(file.exists)
        elif action == "meet":
            wait_until(lambda: len(openers(self.folder)) >= int(name))
        elif action == "hang":
            file.touch()
            time.sleep(600)
        elif action == "fail":
            raise CalibrationError("blocks.0 went wrong.")
        elif action == "be a bug":
            raise ZeroDivisionError("by nothing")
        elif action == "unpicklable":
            raise OSError(threading.Lock())
        elif action == "fill the disk":
            raise OSError(28, "No space left on device", name)
        elif action == "die" or (action == "die once" and not file.exists()):
            file.touch()
            time.sleep(1.5)  # until it is heard that the stage is open
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{name} {os.getpid()}"


def wait_until(happened: Callable[[], bool], timeout_s: float = 150) -> None:
    """Wait; if the event never happens, the waiting item has an error. A worker takes long to start
    on a busy machine.
    """
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, f"waited {timeout_s:g} s in vain"
        time.sleep(0.1)


def openers(folder: Path) -> set[str]:
    """Return the processes that opened the stage of a folder."""
    return {line.split()[0] for line in (folder / "log.txt").read_text().splitlines() if line.split()[1] == "open"}


def lines(folder: Path, word: str) -> list[str]:
    """Return the lines noted with a word, without the process."""
    return [line.partition(" ")[2] for line in (folder / "log.txt").read_text().splitlines() if line.split()[1] == word]


class Counts:
    """A progress that remembers how often each task was begun and advanced."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int, int]] = []
        self.advanced = 0

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        self.begun.append((description, total, done))

        def advance() -> None:
            self.advanced += 1

        return advance
