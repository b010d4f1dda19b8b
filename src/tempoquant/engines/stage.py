"""What a worker does, and what it and its employer say to each other."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from tempoquant.progress import Progress


class Stage(Protocol):
    """One kind of work. A plain value: it is pickled on its way to another process or machine, and so are its items
    and their results."""

    def open(self, device: str, progress: Progress) -> AbstractContextManager[Callable[[Any], Any]]:
        """What is called with one item after the other, inside a context that holds what they share: a model, say.
        Whoever opened the stage gives its memory back when the context is left.

        Args:
            device: where this worker computes.
            progress: where it reports, from its own thread or from others.
        """


class Order(NamedTuple):
    """One item to a worker.

    Attributes:
        number: of the stage among those of the crew. A worker keeps a stage open until the next one comes.
        stage: with the first order of it that a worker gets, since it may be large; then None.
    """

    number: int
    stage: Stage | None
    item: Any


class Message(NamedTuple):
    """From a worker.

    Attributes:
        kind: "start" and "advance" are of progress; "opened" says that a stage is open; "unopened", "done" and "error"
            end an order.
        content: a task, a result or an exception.
    """

    kind: str
    content: Any = None

    @property
    def ends_order(self) -> bool:
        """Whether the worker is free again."""
        return self.kind in ("unopened", "done", "error")


class Event(NamedTuple):
    """What an employer hears: a worker's message, or of its death.

    Attributes:
        place: as of `WorkerPool.place`.
        kind: of `Message`, or "died", whose content says why in words.
    """

    worker: int
    place: Hashable
    kind: str
    content: Any = None
