"""Workers as their employer sees them, and the simplest kind: this very process."""

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tempoquant.device import free_memory, selected
from tempoquant.engines.stage import Stage
from tempoquant.errors import TempoQuantError
from tempoquant.progress import SILENT, Progress


def ignore_result(_item: Any, _result: Any) -> None:
    """Take a result of no interest: a stage's work may be what it leaves on the disk."""


def never_done(_item: Any) -> bool:
    """Say that an item may be done again: no file tells that it is done."""
    return False


def give_up(_item: Any, why: str) -> None:
    """End the run for an item that cannot be done. Raises TempoQuantError."""
    raise TempoQuantError(f"{why} The same command goes on from what is finished.")


@dataclass(frozen=True)
class Job:
    """A stage's items, at least one, and what is to happen with them. Attributes as the arguments of `Crew.run`."""

    stage: Stage
    items: Sequence[Any]
    progress: Progress
    on_done: Callable[[Any, Any], None]
    is_done: Callable[[Any], bool]
    on_lost: Callable[[Any, str], None]


class Crew(abc.ABC):
    """One worker or several, each taking one item at a time."""

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
            progress: where workers' reports go.
            on_done: called in this process with an item and its result as soon as it is done.
            is_done: asked of an item whose worker died: whether it had come to its end all the same, because a file
                says so. It is then not done again, and `on_done` is not called.
            on_lost: called with an item that is given up because workers die of it, and why.

        Raises:
            Exception: what an item raised. Other items in hand are abandoned: items must survive being killed.
            TempoQuantError: no worker can be had.
        """
        if listed := list(items):
            self.run_job(Job(stage, listed, progress, on_done, is_done, on_lost))

    @abc.abstractmethod
    def run_job(self, job: Job) -> None:
        """Do every item of a job, as `run` promises."""


class InProcessCrew(Crew):
    """Runs items in this process, the only worker. Nobody is left to give its item to another when it dies."""

    def __init__(self, device: str) -> None:
        self._device = device

    def run_job(self, job: Job) -> None:
        """See `Crew.run_job`."""
        try:
            with selected(self._device), job.stage.open(self._device, job.progress) as work:
                for item in job.items:
                    job.on_done(item, work(item))
            del work  # it may refer to a model
        finally:
            free_memory()
