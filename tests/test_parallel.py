"""Laws of running jobs side by side."""

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tempoquant.errors import CalibrationError, TempoQuantError
from tempoquant.parallel import run_all
from tempoquant.progress import SILENT, Progress


class Counting:
    """Remembers how often each task advanced."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        self.counts[description] = 0

        def advance() -> None:
            self.counts[description] += 1

        return advance


def count_to_three(name: str, folder: Path, progress: Progress) -> None:
    advance = progress.start(name, 3)
    for _ in range(3):
        advance()
    (folder / name).write_text(str(os.getpid()))


def fail(folder: Path, progress: Progress) -> None:
    while not (folder / "pid").is_file():
        time.sleep(0.01)
    raise CalibrationError("blocks.0 went wrong.")


def fill_the_disk(progress: Progress) -> None:
    raise OSError(28, "No space left on device", "file")


def go_on_for_ever(folder: Path, progress: Progress) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    advance = progress.start("for ever", 10**9)
    while True:
        time.sleep(0.01)
        advance()


def be_killed(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_job_runs_and_reports(tmp_path: Path, num_workers: int) -> None:
    progress = Counting()
    names = ["one", "two", "three"]
    run_all([functools.partial(count_to_three, name, tmp_path) for name in names], num_workers, progress)
    assert progress.counts == dict.fromkeys(names, 3)
    pids = {(tmp_path / name).read_text() for name in names}
    assert (pids == {str(os.getpid())}) if num_workers == 1 else (len(pids) == 3 and str(os.getpid()) not in pids)


def test_the_first_error_is_raised_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="went wrong"):
        run_all([functools.partial(go_on_for_ever, tmp_path), functools.partial(fail, tmp_path)], 2, SILENT)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_errors_of_the_machine_arrive_as_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        run_all([fill_the_disk, functools.partial(count_to_three, "other", tmp_path)], 2, SILENT)


def test_a_killed_worker_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(TempoQuantError, match="killed"):
        run_all([be_killed, functools.partial(count_to_three, "other", tmp_path)], 2, SILENT)
