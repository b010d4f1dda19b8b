"""Workers elsewhere: each pulls one item at a time, so that fast workers do more, and a death costs
only the current item.

A failure counts against the item, the place (a device, a machine), or the work as a whole:

- an item that was running when two workers died, or that failed twice for lack of disk or memory,
  is given up;
- a place where workers die or cannot open the stage, twice in a row, gets no more items in this
  stage;
- an error that TempoQuant raises on purpose, or a bug, would occur everywhere: it ends the run.
"""

import abc
import logging
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from tempoquant.engines.crew import Crew, Job
from tempoquant.engines.stage import Event, Order
from tempoquant.errors import TempoQuantError
from tempoquant.progress import Progress

MOST_FAILURES = 2
"""The most failures of an item, and of a place in a row."""

MOST_LOST = 3
"""If so many items in a row are given up, with none done in between, the items are not the
cause.
"""

_POLL_S = 0.2

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Task:
    """An item and its history.

    Attributes:
        avoid: where it has failed already, so that another place should try it.
    """

    item: Any
    num_failures: int = 0
    avoid: Hashable = None


class WorkerPool(Crew):
    """Distributes items to several workers, whose numbers are never reused.

    The abstract methods start, reach and end a kind of worker; everything else is the same for
    every kind.
    """

    def __init__(self) -> None:
        self._num_stages = self._num_workers = 0
        self.failures: Counter[Hashable] = Counter()
        """Failures in a row, by place, in this stage."""
        self.last_failure: Exception = TempoQuantError("there is no worker.")

    def next_number(self) -> int:
        """Return the number of the next worker."""
        self._num_workers += 1
        return self._num_workers

    def is_usable(self, place: Hashable) -> bool:
        """Return whether a worker may be started there."""
        return self.failures[place] < MOST_FAILURES

    @abc.abstractmethod
    def start_workers(self, num_items: int) -> None:
        """Start workers in usable places that have none, as long as there are items for them.

        Raises:
            Exception: `last_failure`, or another reason why no worker is left and none is
                available.
        """

    @abc.abstractmethod
    def idle(self) -> list[int]:
        """Return workers that wait for an order."""

    @abc.abstractmethod
    def place(self, worker: int) -> Hashable:
        """Return the device or machine of a worker: another worker there would share its fate."""

    @abc.abstractmethod
    def send(self, worker: int, order: Order) -> None:
        """Send an order to an idle worker. If it has died, `events` reports that."""

    @abc.abstractmethod
    def events(self, timeout_s: float) -> list[Event]:
        """Return the workers' events, each worker's in order, after a wait for the first event of
        at most this time.
        """

    @abc.abstractmethod
    def end(self, worker: int) -> None:
        """End a worker at once; it sends no further events."""

    @abc.abstractmethod
    def shut_down(self) -> None:
        """End every worker. `start_workers` would start new ones."""

    def run_job(self, job: Job) -> None:
        """Do every item of a job on the workers; see `Crew.run_job`."""
        self.failures.clear()
        self._num_stages += 1
        try:
            _JobRun(self, self._num_stages, job).loop()
        except BaseException:
            self.shut_down()  # a worker still at work would answer to the next stage
            raise


class _JobRun:
    """Runs one job on a pool."""

    def __init__(self, pool: WorkerPool, number: int, job: Job) -> None:
        self._pool, self._number, self._job = pool, number, job
        self._waiting = deque(_Task(item) for item in job.items)
        self._in_flight: dict[int, _Task] = {}
        self._opened: set[int] = set()
        self._num_lost = 0
        self._progress = _ProgressRelay(job.progress)

    def loop(self) -> None:
        """Run until every item is done or given up."""
        while self._waiting or self._in_flight:
            self._pool.start_workers(len(self._waiting) + len(self._in_flight))
            self._assign()
            for event in self._pool.events(_POLL_S):
                self._handle(event)

    def _assign(self) -> None:
        """Send every idle worker the first item that has not failed in its place; an item that
        failed there is sent only while no other worker is at work.
        """
        for is_picky in (True, False):
            for worker in self._pool.idle():
                place = self._pool.place(worker)
                wanted = (task for task in self._waiting if not is_picky or task.avoid != place)
                if (is_picky or not self._in_flight) and (task := next(wanted, None)) is not None:
                    self._waiting.remove(task)
                    self._in_flight[worker] = task
                    stage = None if worker in self._opened else self._job.stage
                    self._pool.send(worker, Order(self._number, stage, task.item))

    def _handle(self, event: Event) -> None:
        if event.kind == "opened":
            self._opened.add(event.worker)
        elif event.kind == "done":
            self._pool.failures[event.place] = self._num_lost = 0
            self._job.on_done(self._in_flight.pop(event.worker).item, event.content)
        elif event.kind == "error":
            self._handle_error(event, event.content)
        elif event.kind == "unopened":
            self._waiting.appendleft(self._in_flight.pop(event.worker))
            if not _is_of_machine(event.content) and not self._opened:
                raise event.content  # it would occur everywhere; later, only this place differs
            self._blame(event, event.content)
        elif event.kind == "died":
            self._progress.forget(event.worker)
            self._handle_death(event)
        else:
            self._progress.relay(event)

    def _handle_error(self, event: Event, error: Exception) -> None:
        """Count an error that an item raised. For lack of disk or memory, the item may succeed
        elsewhere, or later.
        """
        task = self._in_flight.pop(event.worker)
        task.num_failures += 1
        if not _is_of_machine(error) or task.num_failures >= MOST_FAILURES:
            raise error
        task.avoid = event.place
        self._waiting.appendleft(task)
        self._blame(event, error)

    def _handle_death(self, event: Event) -> None:
        task = self._in_flight.pop(event.worker, None)
        self._blame(event, TempoQuantError(f"{event.content} The same command resumes the run."))
        if task is None or self._job.is_done(task.item):
            return
        task.num_failures += event.worker in self._opened  # before, it had not reached the item
        if task.num_failures < MOST_FAILURES:
            task.avoid = event.place
            self._waiting.appendleft(task)
            return
        self._num_lost += 1
        if self._num_lost >= MOST_LOST:
            raise self._pool.last_failure
        self._pool.failures.clear()  # the item was the cause
        self._job.on_lost(task.item, f"{MOST_FAILURES} workers died of the same work. {event.content}")

    def _blame(self, event: Event, error: Exception) -> None:
        """Count a failure of a place; if no place is left, the last failure gives the reason."""
        self._pool.failures[event.place] += 1
        self._pool.last_failure = error
        usable = self._pool.is_usable(event.place)
        _logger.warning("%s %s", error, "Trying again." if usable else "No more work goes there in this stage.")
        if not usable and event.kind != "died":
            self._pool.end(event.worker)


def _is_of_machine(error: Exception) -> bool:
    """Return whether lack of disk or memory is the cause."""
    return isinstance(error, OSError | MemoryError | torch.OutOfMemoryError)


class _ProgressRelay:
    """Relays the progress that workers report."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[tuple[int, int], Callable[[], None]] = {}

    def relay(self, event: Event) -> None:
        """Relay an event of kind start or advance."""
        if event.kind == "start":
            task, description, total, done = event.content
            self._tasks[event.worker, task] = self._progress.start(description, total, done)
        elif (event.worker, event.content) in self._tasks:
            self._tasks[event.worker, event.content]()

    def forget(self, worker: int) -> None:
        """Drop the tasks of a dead worker; others begin their own."""
        self._tasks = {key: advance for key, advance in self._tasks.items() if key[0] != worker}
