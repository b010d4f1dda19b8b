"""A lock for pipelines whose weights come and go: one thread at a time computes with their models.

A model that is moved while another thread computes with it gives wrong results, or stops in the
middle. Threads may share models, each with its own scheduler, so the second thread waits until the
first one has finished.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from tempoquant.models.hooks import unobtrusive

_LOOK_AGAIN_S = 1.0  # whether the thread inside still lives


class Turn:
    """The thread that holds the lock. It may enter again, since an interrupted call never left."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: threading.Thread | None = None

    def take(self) -> None:
        """Wait until no other thread holds the turn, and take it."""
        me = threading.current_thread()
        with self._changed:
            while self._inside is not None and self._inside is not me and self._inside.is_alive():
                self._changed.wait(_LOOK_AGAIN_S)
            self._inside = me

    def give_back(self) -> None:
        """Release the turn."""
        with self._changed:
            if self._inside is threading.current_thread():
                self._inside = None
                self._changed.notify()


def one_at_a_time(turn: Turn, models: Iterable[nn.Module], methods: Iterable[tuple[Any, str]]) -> ExitStack:
    """Make calls of models, and methods of objects, wait for their turn. Closing the stack undoes
    it.

    Call it after all other hooks were added to the models, since these belong to the turn.
    """
    undo = ExitStack()
    for model in models:
        before = model.register_forward_pre_hook(unobtrusive(lambda *_: turn.take()), prepend=True)
        after = model.register_forward_hook(unobtrusive(lambda *_: turn.give_back()), always_call=True)
        undo.callback(before.remove)
        undo.callback(after.remove)
    for owner, name in methods:
        setattr(owner, name, _in_turn(getattr(owner, name), turn))
        undo.callback(delattr, owner, name)
    return undo


def _in_turn(method: Callable[..., Any], turn: Turn) -> Callable[..., Any]:
    @functools.wraps(method)
    def in_turn(*args: Any, **kwargs: Any) -> Any:
        turn.take()
        try:
            return method(*args, **kwargs)
        finally:
            turn.give_back()

    return in_turn
