"""Run a few long jobs at once, each in a process of its own, and stop all of them when one fails or Ctrl-C comes."""

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from tempoquant.errors import TempoQuantError
from tempoquant.progress import Progress

Job = Callable[[Progress], None]
_POLL_S = 0.2


class _Message(NamedTuple):
    """From a job to its parent. kind: start, advance, done or error."""

    job: int
    kind: str
    content: Any = None


class _Reporting:
    """A progress whose watcher is in the parent process."""

    def __init__(self, job: int, messages: Any) -> None:
        self._job, self._messages = job, messages
        self._num_tasks = 0

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """See `Progress.start`."""
        task = self._num_tasks
        self._num_tasks += 1
        self._messages.put(_Message(self._job, "start", (task, description, total, done)))
        return lambda: self._messages.put(_Message(self._job, "advance", task))


def run_all(jobs: Sequence[Job], num_workers: int, progress: Progress) -> None:
    """Run every job, `num_workers` at a time, each reporting to `progress`.

    With one worker they run in this process, one after the other. Otherwise each gets a process of its own and its
    share of the CPU's threads; jobs are then pickled, so they are module-level functions, or partials of such.

    Raises:
        TempoQuantError: a job raised one, or its process was killed. The other jobs are ended at once: they must
            survive being killed.
    """
    if num_workers == 1:
        for job in jobs:
            job(progress)
        return
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    num_threads = max(1, torch.get_num_threads() // num_workers)
    waiting: list[BaseProcess] = [
        context.Process(target=_work, args=(number, job, messages, num_threads), daemon=True)
        for number, job in enumerate(jobs)
    ]
    running: dict[int, BaseProcess] = {}
    watcher = _Watcher(progress)
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                process = waiting.pop(0)
                process.start()
                running[len(jobs) - len(waiting) - 1] = process
            dead = [number for number, process in running.items() if not process.is_alive()]
            for number in watcher.watch(messages):
                running.pop(number).join()
            for number in dead:  # nothing of it is left in the queue, and it never said that it was done
                if number in running:
                    raise TempoQuantError(_killed(running[number].exitcode))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


class _Watcher:
    """Passes on what jobs report."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[tuple[int, int], Callable[[], None]] = {}

    def watch(self, messages: Any) -> list[int]:
        """Everything that has been reported; the jobs that are done. Raises what a job raised."""
        finished: list[int] = []
        timeout = _POLL_S
        while True:
            try:
                message = messages.get(timeout=timeout)
            except queue.Empty:
                return finished
            timeout = _POLL_S / 10
            if message.kind == "start":
                task, description, total, done = message.content
                self._tasks[message.job, task] = self._progress.start(description, total, done)
            elif message.kind == "advance":
                self._tasks[message.job, message.content]()
            elif message.kind == "done":
                finished.append(message.job)
            else:
                raise message.content


def _work(number: int, job: Job, messages: Any, num_threads: int) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    try:
        job(_Reporting(number, messages))
        messages.put(_Message(number, "done"))
    except (TempoQuantError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        messages.put(_Message(number, "error", error))
    except Exception as error:  # a bug: its traceback would be lost with this process
        messages.put(_Message(number, "error", RuntimeError(f"{error}\n{traceback.format_exc()}")))


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they must not work on beside the run that follows."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _killed(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return (
            f"a worker process was killed (signal {-exit_code}), as happens when memory runs out: use one device, or "
            "see --dry-run for what a run needs. The same command continues."
        )
    return f"a worker process ended by itself (exit code {exit_code}). The same command continues."
