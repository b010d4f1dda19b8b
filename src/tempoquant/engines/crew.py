"""Workers as their employer sees them, and the simplest kind: this very process."""

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tempoquant.engines.memory import free_memory, selected
from tempoquant.engines.stage import Stage
from tempoquant.errors import TempoQuantError
from tempoquant.progress import SILENT, Progress


def nothing(_item: Any, _result: Any) -> None:
    """Results are of no interest: a stage's work may be what it leaves on the disk."""


def never(_item: Any) -> bool:
    """No file says that an item is done: it may be done again."""
    return False


def give_up(_item: Any, why: str) -> None:
    """An item that cannot be done ends the run. Raises TempoQuantError."""
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
        on_done: Callable[[Any, Any], None] = nothing,
        is_done: Callable[[Any], bool] = never,
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
            self.work_off(Job(stage, listed, progress, on_done, is_done, on_lost))

    @abc.abstractmethod
    def work_off(self, job: Job) -> None:
        """Do a job, as `run` promises."""


class Alone(Crew):
    """One worker: this process. Nobody is left to give its item to another when it dies."""

    def __init__(self, device: str) -> None:
        self._device = device

    def work_off(self, job: Job) -> None:
        """See `Crew.work_off`."""
        try:
            with selected(self._device), job.stage.open(self._device, job.progress) as work:
                for item in job.items:
                    job.on_done(item, work(item))
            del work  # it may refer to a model
        finally:
            free_memory()
