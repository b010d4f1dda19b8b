"""Laws of running jobs at once."""

import threading
import time

import pytest

from tempoquant.parallel import run_all
from tempoquant.progress import SILENT, Progress


def test_one_worker_runs_in_this_thread_and_in_order() -> None:
    ran: list[tuple[int, str]] = []
    run_all([lambda _, n=n: ran.append((n, threading.current_thread().name)) for n in range(3)], 1, SILENT)
    assert ran == [(n, threading.current_thread().name) for n in range(3)]


def test_two_workers_run_at_once() -> None:
    both = threading.Barrier(2, timeout=20)
    run_all([lambda _: both.wait(), lambda _: both.wait()], 2, SILENT)


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("first", [True, False], ids=["first fails", "second fails"])
def test_an_error_ends_the_other_job_at_its_next_unit(error: BaseException, first: bool) -> None:
    started, ended = threading.Event(), threading.Event()

    def fails(_: Progress) -> None:
        started.wait(20)
        raise error

    def long_job(progress: Progress) -> None:
        advance = progress.start("long", 10**6)
        started.set()
        try:
            for _ in range(10**6):
                time.sleep(0.01)
                advance()
        finally:
            ended.set()

    jobs = [fails, long_job] if first else [long_job, fails]
    with pytest.raises(type(error)):
        run_all(jobs, 2, SILENT)
    assert ended.is_set()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
