"""The work of a worker, and the messages between it and its caller."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from tempoquant.progress import Progress


class Stage(Protocol):
    """One kind of work. A plain value: it is pickled on its way to another process or machine, and
    so are its items and their results.
    """

    def open(self, device: str, progress: Progress) -> AbstractContextManager[Callable[[Any], Any]]:
        """Open the stage: yield a function of one item, inside a context that holds shared state,
        such as a model.

        The caller releases the stage's memory at the end of the context.

        Args:
            device: where this worker computes.
            progress: receives its reports, from its own thread or from others.
        """


class Order(NamedTuple):
    """One item to a worker.

    Attributes:
        number: of the stage among those of the crew. A worker keeps a stage open until the next one
            begins.
        stage: sent with its first order to a worker, since it may be large; None after that.
    """

    number: int
    stage: Stage | None
    item: Any


class Message(NamedTuple):
    """A message from a worker.

    Attributes:
        kind: "start" and "advance" report progress; "opened" tells that a stage is open;
            "unopened", "done" and "error" end an order.
        content: a task, a result or an exception.
    """

    kind: str
    content: Any = None

    @property
    def ends_order(self) -> bool:
        """Return whether the worker is free again."""
        return self.kind in ("unopened", "done", "error")


class Event(NamedTuple):
    """An event at the caller: a worker's message, or its death.

    Attributes:
        place: as in `WorkerPool.place`.
        kind: as in `Message`, or "died", whose content gives the reason in words.
    """

    worker: int
    place: Hashable
    kind: str
    content: Any = None
