"""The inside of a worker: it opens stages, does one item after the other, and reports the
outcome.
"""

import contextlib
import copy
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from tempoquant.device import free_memory, is_device_lost
from tempoquant.engines.stage import Message, Order
from tempoquant.errors import DeviceError, TempoQuantError

DEVICE_LOST = 70
"""The exit code of a worker whose device stopped working."""


class Worker:
    """Does the orders of one worker; the caller manages its process.

    Args:
        device: where it computes.
        send: takes its messages; called by one thread at a time.
    """

    def __init__(self, device: str, send: Callable[[Message], None]) -> None:
        self._device, self._send = device, send
        self._lock = threading.Lock()
        self._number: int | None = None
        self._open = contextlib.ExitStack()
        self._work: Callable[[Any], Any] | None = None

    def do(self, order: Order) -> None:
        """Do an item, and send its outcome. Nothing is raised.

        A worker whose device stopped working ends its process: a new process may be able to use it.
        """
        ending = "unopened"
        try:
            work = self._opened_stage(order)
            self._post(Message("opened"))
            ending = "error"
            result = work(order.item)
        except DeviceError as error:
            _exit(error)
        except (TempoQuantError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            self._post(Message(ending, _picklable(error)))
        except Exception as error:
            if is_device_lost(error):
                _exit(error)
            # A bug: its traceback would be lost with this process.
            self._post(Message(ending, RuntimeError(f"{error}\n{traceback.format_exc()}")))
        else:
            self._post(Message("done", result))

    def close(self) -> None:
        """Release the open stage."""
        self._number, self._work = None, None
        self._open.close()
        free_memory()

    def _opened_stage(self, order: Order) -> Callable[[Any], Any]:
        if self._work is None or order.number != self._number:
            self.close()
            assert order.stage is not None  # the first order of a stage to each worker carries it
            self._work = self._open.enter_context(order.stage.open(self._device, _SentProgress(self._post)))
            self._number = order.number
        return self._work

    def _post(self, message: Message) -> None:
        with self._lock:
            self._send(message)


class _SentProgress:
    """Sends progress as messages to a remote watcher."""

    def __init__(self, post: Callable[[Message], None]) -> None:
        self._post = post
        self._num_tasks = 0

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """Begin a task; see `Progress.start`."""
        task = self._num_tasks
        self._num_tasks += 1
        self._post(Message("start", (task, description, total, done)))
        return lambda: self._post(Message("advance", task))


def _exit(error: Exception) -> NoReturn:
    print(error, file=sys.stderr, flush=True)
    os._exit(DEVICE_LOST)


def _picklable(error: Exception) -> Exception:
    """Return the error itself if it can be pickled, else one with the same message."""
    try:
        copy.deepcopy(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
