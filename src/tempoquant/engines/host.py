"""The inside of a worker: opens stages, does one item after the other, and tells how it went."""

import contextlib
import copy
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from tempoquant.engines.memory import free_memory, is_device_lost
from tempoquant.engines.stage import Message, Order
from tempoquant.errors import DeviceError, TempoQuantError

DEVICE_LOST = 70
"""Exit code of a worker whose device stopped working."""


class Host:
    """A worker without its process.

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
        """Do an item, and send how it ended. Nothing is raised.

        A worker whose device stopped working ends its process: another one may find it working again.
        """
        ending = "unopened"
        try:
            work = self._stage(order)
            self._say(Message("opened"))
            ending = "error"
            result = work(order.item)
        except DeviceError as error:
            _end(error)
        except (TempoQuantError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            self._say(Message(ending, _portable(error)))
        except Exception as error:
            if is_device_lost(error):
                _end(error)
            # A bug: its traceback would be lost with this process.
            self._say(Message(ending, RuntimeError(f"{error}\n{traceback.format_exc()}")))
        else:
            self._say(Message("done", result))

    def close(self) -> None:
        """Let go of what the open stage holds."""
        self._number, self._work = None, None
        self._open.close()
        free_memory()

    def _stage(self, order: Order) -> Callable[[Any], Any]:
        if self._work is None or order.number != self._number:
            self.close()
            assert order.stage is not None  # it comes with a stage's first order to each worker
            self._work = self._open.enter_context(order.stage.open(self._device, _Reporting(self._say)))
            self._number = order.number
        return self._work

    def _say(self, message: Message) -> None:
        with self._lock:
            self._send(message)


class _Reporting:
    """A progress whose watcher is elsewhere."""

    def __init__(self, say: Callable[[Message], None]) -> None:
        self._say = say
        self._num_tasks = 0

    def start(self, description: str, total: int, done: int = 0) -> Callable[[], None]:
        """See `Progress.start`."""
        task = self._num_tasks
        self._num_tasks += 1
        self._say(Message("start", (task, description, total, done)))
        return lambda: self._say(Message("advance", task))


def _end(error: Exception) -> NoReturn:
    print(error, file=sys.stderr, flush=True)
    os._exit(DEVICE_LOST)


def _portable(error: Exception) -> Exception:
    """The error itself where it can be taken apart and put together again, else one that says the same."""
    try:
        copy.deepcopy(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
