"""One process for each device of this machine."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tempoquant.device import selected
from tempoquant.engines.stage import Event, Order
from tempoquant.engines.worker import DEVICE_LOST, Worker
from tempoquant.engines.worker_pool import WorkerPool

_JOIN_TIMEOUT_S = 5.0


@dataclass
class _WorkerProcess:
    number: int
    device: int
    process: BaseProcess
    connection: Any
    busy: bool = False


class ProcessPool(WorkerPool):
    """Runs a worker process for each device, with its share of the CPU's threads.

    The processes are spawned, so scripts that call this need `if __name__ == "__main__":`.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        super().__init__()
        self._devices = tuple(devices)
        self._num_threads = max(1, torch.get_num_threads() // len(devices))
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _WorkerProcess] = {}

    def start_workers(self, num_items: int) -> None:
        """Start workers; see `WorkerPool.start_workers`."""
        taken = {worker.device for worker in self._workers.values()}
        for index, device in enumerate(self._devices):
            if index not in taken and self.is_usable(index) and len(self._workers) < num_items:
                here, there = self._context.Pipe()
                process = self._context.Process(target=_serve, args=(there, device, self._num_threads), daemon=True)
                process.start()
                there.close()  # otherwise the worker's end would go unnoticed
                number = self.next_number()
                self._workers[number] = _WorkerProcess(number, index, process, here)
        if not self._workers:
            raise self.last_failure

    def idle(self) -> list[int]:
        """Return idle workers; see `WorkerPool.idle`."""
        return [worker.number for worker in self._workers.values() if not worker.busy]

    def place(self, worker: int) -> int:
        """Return a worker's place; see `WorkerPool.place`."""
        return self._workers[worker].device

    def send(self, worker: int, order: Order) -> None:
        """Send an order; see `WorkerPool.send`."""
        self._workers[worker].busy = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._workers[worker].connection.send(order)

    def events(self, timeout_s: float) -> list[Event]:
        """Return events; see `WorkerPool.events`."""
        by_connection = {worker.connection: worker for worker in self._workers.values()}
        ready = multiprocessing.connection.wait(list(by_connection), timeout_s)
        return [event for connection in ready for event in self._received(by_connection[connection])]

    def end(self, worker: int) -> None:
        """End a worker; see `WorkerPool.end`."""
        self._end([self._workers.pop(worker)])

    def shut_down(self) -> None:
        """End every worker; see `WorkerPool.shut_down`."""
        workers, self._workers = list(self._workers.values()), {}
        self._end(workers)

    @staticmethod
    def _end(workers: Sequence[_WorkerProcess]) -> None:
        for worker in workers:
            worker.connection.close()  # an idle worker then ends by itself, and cleans up
            if worker.busy:
                worker.process.terminate()
        for worker in workers:
            worker.process.join(_JOIN_TIMEOUT_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _received(self, worker: _WorkerProcess) -> list[Event]:
        found = []
        try:
            while worker.connection.poll():
                message = worker.connection.recv()
                worker.busy = worker.busy and not message.ends_order
                found.append(Event(worker.number, worker.device, message.kind, message.content))
        except (EOFError, OSError):
            worker.process.join()
            worker.connection.close()
            del self._workers[worker.number]
            found.append(Event(worker.number, worker.device, "died", _cause_of_death(worker.process.exitcode)))
        return found


def _serve(connection: Connection, device: str, num_threads: int) -> None:
    """Take orders and send messages in a worker process, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    worker = Worker(device, connection.send)
    with selected(device):
        while True:
            try:
                order = connection.recv()
            except EOFError:
                worker.close()
                return
            with contextlib.suppress(BrokenPipeError):  # the parent has gone, as the loop's next line will notice
                worker.do(order)


def _end_with_parent() -> None:
    """End this process with its parent: a killed parent cannot end its workers, and they must not
    compete with the next run.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return (
            f"A worker process was killed (signal {-exit_code}), as happens when memory runs out: fewer devices at "
            "once need less."
        )
    if exit_code == DEVICE_LOST:
        return "A worker's GPU stopped working."
    return f"A worker process ended by itself (exit code {exit_code})."
