"""Run a few long jobs at once, and stop all of them soon when one fails or Ctrl-C comes."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from tempoquant.progress import Progress


class _Stopped(Exception):
    """Ends a job whose result nobody waits for any more."""


class _Stoppable:
    """A progress that, once told to stop, ends the job at its next finished unit."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.stop = threading.Event()

    def start(self, description: str, total: int) -> Callable[[], None]:
        """See `Progress.start`."""
        advance = self._progress.start(description, total)

        def advance_or_stop() -> None:
            if self.stop.is_set():
                raise _Stopped
            advance()

        return advance_or_stop


def run_all(jobs: Sequence[Callable[[Progress], None]], num_workers: int, progress: Progress) -> None:
    """Run every job, `num_workers` at a time, each reporting to `progress`.

    With one worker they run in this thread, one after the other. Otherwise the first error, or Ctrl-C, ends the other
    jobs at their next finished unit and is raised.
    """
    if num_workers == 1:
        for job in jobs:
            job(progress)
        return
    stoppable = _Stoppable(progress)
    pool = ThreadPoolExecutor(num_workers)
    try:
        running = [pool.submit(job, stoppable) for job in jobs]
        for future in wait(running, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BaseException:
        stoppable.stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
