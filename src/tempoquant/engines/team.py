"""Workers elsewhere: items are pulled one by one, so that whoever is fast does more, and a death costs only the item in
hand."""

import abc
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tempoquant.engines.crew import Crew, give_up, never, nothing
from tempoquant.engines.stage import Event, Order, Stage
from tempoquant.progress import SILENT, Progress

MOST_DEATHS = 2
"""An item in whose course so many workers died is given up: it is the item, more likely than the workers."""

_POLL_S = 0.2

_logger = logging.getLogger(__name__)


@dataclass
class _Task:
    """An item on its way."""

    item: Any
    num_deaths: int = 0


class Team(Crew):
    """Workers that have numbers, which no two of them ever share. What a kind of them has to know is in the abstract
    methods; `run` is the same for all."""

    def __init__(self) -> None:
        self._num_stages = self._num_workers = 0

    def next_number(self) -> int:
        """Of the worker that begins now."""
        self._num_workers += 1
        return self._num_workers

    @abc.abstractmethod
    def recruit(self, num_items: int) -> None:
        """Start workers where one is missing, as far as there are items for them. Raises TempoQuantError where none
        can be had."""

    @abc.abstractmethod
    def idle(self) -> list[int]:
        """Workers that wait for an order."""

    @abc.abstractmethod
    def give(self, worker: int, order: Order) -> None:
        """Give it to an idle worker. If that one has died, `events` will say so."""

    @abc.abstractmethod
    def events(self, timeout_s: float) -> list[Event]:
        """What was heard of workers, each one's in its order, waiting for the first event at most so long."""

    @abc.abstractmethod
    def dismiss(self) -> None:
        """End every worker, whatever it is doing. `recruit` would start new ones."""

    def run(
        self,
        stage: Stage,
        items: Iterable[Any],
        *,
        progress: Progress = SILENT,
        on_done: Callable[[Any, Any], None] = nothing,
        is_done: Callable[[Any], bool] = never,
        on_lost: Callable[[Any, str], None] = give_up,
    ) -> None:
        """See `Crew.run`."""
        try:
            self._run(stage, deque(_Task(item) for item in items), _Watcher(progress), on_done, is_done, on_lost)
        except BaseException:
            self.dismiss()  # whoever is still at work would answer to the next stage
            raise

    def _run(
        self,
        stage: Stage,
        waiting: deque[_Task],
        watcher: "_Watcher",
        on_done: Callable[[Any, Any], None],
        is_done: Callable[[Any], bool],
        on_lost: Callable[[Any, str], None],
    ) -> None:
        in_hand: dict[int, _Task] = {}
        told: set[int] = set()
        self._num_stages += 1
        while waiting or in_hand:
            self.recruit(len(waiting) + len(in_hand))
            for worker in self.idle():
                if waiting:
                    in_hand[worker] = waiting.popleft()
                    known = worker in told
                    self.give(worker, Order(self._num_stages, None if known else stage, in_hand[worker].item))
                    told.add(worker)
            for event in self.events(_POLL_S):
                if event.kind == "done":
                    on_done(in_hand.pop(event.worker).item, event.content)
                elif event.kind == "error":
                    raise event.content
                elif event.kind == "died":
                    watcher.forget(event.worker)
                    task = in_hand.pop(event.worker, None)
                    if task is not None and not is_done(task.item) and not _given_up(task, event.content, on_lost):
                        _logger.warning("%s Another worker takes over.", event.content)
                        waiting.appendleft(task)
                else:
                    watcher.pass_on(event)


def _given_up(task: _Task, why: str, on_lost: Callable[[Any, str], None]) -> bool:
    """A worker died with it in hand: whether that was once too often."""
    task.num_deaths += 1
    if task.num_deaths < MOST_DEATHS:
        return False
    on_lost(task.item, f"{MOST_DEATHS} workers died of the same work. {why}")
    return True


class _Watcher:
    """Passes on what workers report."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[tuple[int, int], Callable[[], None]] = {}

    def pass_on(self, event: Event) -> None:
        """Of kind start or advance."""
        if event.kind == "start":
            task, description, total, done = event.content
            self._tasks[event.worker, task] = self._progress.start(description, total, done)
        elif (event.worker, event.content) in self._tasks:
            self._tasks[event.worker, event.content]()

    def forget(self, worker: int) -> None:
        """It is dead; others begin tasks of their own."""
        self._tasks = {key: advance for key, advance in self._tasks.items() if key[0] != worker}
