"""The interface of workers to their caller, and the simplest crew: this process."""

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tempoquant.device import free_memory, selected
from tempoquant.engines.stage import Stage
from tempoquant.errors import TempoQuantError
from tempoquant.progress import SILENT, Progress


def ignore_result(_item: Any, _result: Any) -> None:
    """Ignore a result: a stage's output may be the files that it writes."""


def never_done(_item: Any) -> bool:
    """Return False: an item may be repeated, since no file shows that it is done."""
    return False


def give_up(_item: Any, why: str) -> None:
    """End the run for an item that cannot be done. Raises TempoQuantError."""
    raise TempoQuantError(f"{why} The same command resumes the run.")


@dataclass(frozen=True)
class Job:
    """A stage's items, at least one, and the callbacks for them. Attributes are the arguments of
    `Crew.run`.
    """

    stage: Stage
    items: Sequence[Any]
    progress: Progress
    on_done: Callable[[Any, Any], None]
    is_done: Callable[[Any], bool]
    on_lost: Callable[[Any, str], None]


class Crew(abc.ABC):
    """One or more workers, each with one item at a time."""

    def run(
        self,
        stage: Stage,
        items: Iterable[Any],
        *,
        progress: Progress = SILENT,
        on_done: Callable[[Any, Any], None] = ignore_result,
        is_done: Callable[[Any], bool] = never_done,
        on_lost: Callable[[Any, str], None] = give_up,
    ) -> None:
        """Do every item, begun in the order given, each exactly once unless its worker dies.

        Args:
            stage: opened once by each worker, and not at all where there is no item.
            items: picklable.
            progress: receives the workers' reports.
            on_done: called in this process with an item and its result as soon as it is done.
            is_done: called with an item whose worker died: whether a file shows that the item was
                finished nevertheless. It is then not repeated, and `on_done` is not called.
            on_lost: called with an item that is given up because workers died of it, and the
                reason.

        Raises:
            Exception: raised by an item. Other running items are abandoned: items must survive a
                kill.
            TempoQuantError: no worker is available.
        """
        if listed := list(items):
            self.run_job(Job(stage, listed, progress, on_done, is_done, on_lost))

    @abc.abstractmethod
    def run_job(self, job: Job) -> None:
        """Do every item of a job, as `run` promises."""


class InProcessCrew(Crew):
    """Runs items in this process, the only worker. No other worker can take over its item if it
    dies.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def run_job(self, job: Job) -> None:
        """Do every item of a job in this process; see `Crew.run_job`."""
        try:
            with selected(self._device), job.stage.open(self._device, job.progress) as work:
                for item in job.items:
                    job.on_done(item, work(item))
            del work  # it may refer to a model
        finally:
            free_memory()
