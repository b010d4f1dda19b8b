"""Workers on a Ray cluster: one actor for each GPU, or for each machine that computes on its CPU.

Only the Ray engine imports this module, since Ray is optional.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tempoquant.engines.ray_membership import Membership
from tempoquant.engines.stage import Event, Message, Order
from tempoquant.engines.worker import Worker
from tempoquant.engines.worker_pool import MOST_FAILURES, WorkerPool
from tempoquant.errors import TempoQuantError, UnsupportedError

_NO_WORKER_TIMEOUT_S = 60.0
"""The longest time that a cluster may be without any usable machine: a restart takes a while."""

_SCAN_INTERVAL_S = 5.0
"""The interval between scans for machines."""

_START_TIMEOUT_S = 30.0
"""A worker that takes longer to start may be waiting for resources in use: meanwhile another is
tried elsewhere.
"""

_logger = logging.getLogger(__name__)


class _Actor:
    """The actor on the cluster. Orders run in a separate thread, so that it can answer
    meanwhile.
    """

    def __init__(self, device: str) -> None:
        self._messages: deque[Message] = deque()
        self._draining = threading.Lock()
        self._worker = Worker(device, self._messages.append)

    @ray.method(concurrency_group="work")
    def join(self, membership: Membership, num_threads: int) -> str | None:
        """Prepare for orders. Returns an objection if this machine does not meet the
        requirements.
        """
        torch.set_num_threads(num_threads)  # Ray allows as many as the requested CPUs
        return membership.objection()

    @ray.method(concurrency_group="work")
    def do(self, order: Order) -> list[Message]:
        """Do an order. Returns the messages that are not fetched yet; the last one tells how it
        ended.
        """
        self._worker.do(order)
        return self._drain()

    @ray.method(concurrency_group="messages")
    def messages(self) -> list[Message]:
        """Return the messages since the last call, except those that end an order: `do` returns
        these itself.
        """
        return self._drain(but_last=True)

    def _drain(self, but_last: bool = False) -> list[Message]:
        found = []
        with self._draining:
            while self._messages and not (but_last and self._messages[0].ends_order):
                found.append(self._messages.popleft())
        return found


@dataclass
class _ActorHandle:
    """A worker's actor.

    Attributes:
        future: of its current work, at first of joining; None if it is idle.
        messages_future: of its messages.
    """

    number: int
    node: str
    machine: str
    actor: Any
    future: Any
    is_ready: bool = False
    messages_future: Any = None
    started_at_s: float = field(default_factory=time.monotonic)


class RayActorPool(WorkerPool):
    """Runs an actor for each place on the cluster, also on machines that join later. Failures count
    against a whole machine.

    Args:
        device: "cuda" or "cpu".
        membership: what every worker must have in common with this machine.
    """

    def __init__(self, device: str, membership: Membership) -> None:
        super().__init__()
        self._device, self._membership = device, membership
        self._workers: dict[int, _ActorHandle] = {}
        self._has_been_ready = False
        self._last_scan = -_SCAN_INTERVAL_S
        self._last_usable = self._last_ready = time.monotonic()

    def start_workers(self, num_items: int) -> None:
        """Start workers; see `WorkerPool.start_workers`."""
        now = time.monotonic()
        if now - self._last_scan < _SCAN_INTERVAL_S:
            return
        self._last_scan = now
        self._end_surplus(num_items)
        nodes = [node for node in ray.nodes() if node["Alive"] and self._num_places(node)]
        usable = [node for node in nodes if self.is_usable(node["NodeID"])]
        # Machine by machine, so that models are loaded from many disks and networks at once. A
        # worker that does not start in time may be waiting for someone else's work to end.
        workers = self._workers.values()
        num_counted = sum(each.is_ready or now - each.started_at_s < _START_TIMEOUT_S for each in workers)
        for place in range(max(map(self._num_places, usable), default=0)):
            for node in usable:
                there = sum(worker.node == node["NodeID"] for worker in self._workers.values())
                if num_counted < num_items and there <= place < self._num_places(node):
                    self._start(node)
                    num_counted += 1
        self._check_workers(now, bool(nodes), bool(usable))

    def idle(self) -> list[int]:
        """Return idle workers; see `WorkerPool.idle`."""
        return [worker.number for worker in self._workers.values() if worker.future is None]

    def place(self, worker: int) -> str:
        """Return a worker's place; see `WorkerPool.place`."""
        return self._workers[worker].node

    def send(self, worker: int, order: Order) -> None:
        """Send an order; see `WorkerPool.send`."""
        self._workers[worker].future = self._workers[worker].actor.do.remote(order)

    def events(self, timeout_s: float) -> list[Event]:
        """Return events; see `WorkerPool.events`."""
        futures = {worker.future: worker for worker in self._workers.values() if worker.future is not None}
        if not futures:
            time.sleep(timeout_s)  # every machine is gone: `start_workers` waits for one
            return []
        finished, _ = ray.wait(list(futures), num_returns=1, timeout=timeout_s)
        found = [event for worker in self._workers.values() for event in self._poll_messages(worker)]
        for future in finished:
            found += self._take_result(futures[future])
        return found

    def end(self, worker: int) -> None:
        """End a worker; see `WorkerPool.end`. A machine out of reach may only be cut off; its
        worker dies when it is back.
        """
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._workers.pop(worker).actor)

    def shut_down(self) -> None:
        """End every worker; see `WorkerPool.shut_down`."""
        for worker in list(self._workers):
            self.end(worker)
        self._last_scan = -_SCAN_INTERVAL_S

    def _num_places(self, node: dict[str, Any]) -> int:
        resources = node["Resources"]
        return int(resources.get("GPU", 0)) if self._device == "cuda" else int(resources.get("CPU", 0) >= 1)

    def _end_surplus(self, num_items: int) -> None:
        """End surplus workers that were started elsewhere meanwhile and still wait, once there are
        enough.
        """
        if sum(worker.is_ready for worker in self._workers.values()) >= num_items:
            for worker in [worker for worker in self._workers.values() if not worker.is_ready]:
                self.end(worker.number)

    def _check_workers(self, now: float, are_there: bool, are_usable: bool) -> None:
        """Raise if no worker is left and none is available; warn if none has been ready for
        long.
        """
        if are_usable or self._workers:
            self._last_usable = now
        elif are_there:
            raise self.last_failure
        elif now - self._last_usable > _NO_WORKER_TIMEOUT_S:
            raise TempoQuantError(
                f"no machine of the Ray cluster is left that can work with {self._device}: see `ray status`. What is "
                "finished is kept, and the same command resumes."
            )
        if any(worker.is_ready for worker in self._workers.values()):
            self._last_ready = now
        elif now - self._last_ready > _NO_WORKER_TIMEOUT_S:
            self._last_ready = now
            _logger.warning("still waiting for machines of the Ray cluster: do others use them (`ray status`)?")

    def _start(self, node: dict[str, Any]) -> None:
        num_threads = max(1, int(node["Resources"].get("CPU", 0)) // self._num_places(node))
        actor = (
            ray.remote(concurrency_groups={"work": 1, "messages": 1})(_Actor)
            .options(
                num_cpus=1,  # all of them would be available only on an idle cluster
                num_gpus=int(self._device == "cuda"),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(self._device)
        )
        number, future = self.next_number(), actor.join.remote(self._membership, num_threads)
        self._workers[number] = _ActorHandle(number, node["NodeID"], node["NodeManagerAddress"], actor, future)

    def _poll_messages(self, worker: _ActorHandle) -> list[Event]:
        """Fetch messages of an order that is still running."""
        if worker.future is None or not worker.is_ready:
            return []
        messages = []
        if worker.messages_future is not None and ray.wait([worker.messages_future], timeout=0)[0]:
            messages = self._fetch(worker)
        if worker.messages_future is None:
            worker.messages_future = worker.actor.messages.remote()
        return [Event(worker.number, worker.node, *message) for message in messages]

    def _fetch(self, worker: _ActorHandle) -> list[Message]:
        """Return the requested messages; none if the worker has died since, as its future will
        tell.
        """
        future, worker.messages_future = worker.messages_future, None
        with contextlib.suppress(ray.exceptions.RayError):
            return list(ray.get(future))
        return []

    def _take_result(self, worker: _ActorHandle) -> list[Event]:
        """Take the result of a worker's finished order, success or failure."""
        try:
            result = ray.get(worker.future)
        except ray.exceptions.RayError as error:
            return [self._death_of(worker, error)]
        worker.future = None
        if worker.is_ready:
            fetched = [] if worker.messages_future is None else self._fetch(worker)
            return [Event(worker.number, worker.node, *message) for message in [*fetched, *result]]
        if result is not None:
            self._reject(worker, UnsupportedError(f"{worker.machine} {result}"))
            return []
        worker.is_ready = self._has_been_ready = True
        return []

    def _reject(self, worker: _ActorHandle, error: TempoQuantError) -> None:
        """End a worker whose machine does not meet the requirements; raise if no other was ready
        before, else warn.
        """
        self.end(worker.number)
        if not self._has_been_ready:
            raise error
        self.failures[worker.node], self.last_failure = MOST_FAILURES, error
        _logger.warning("%s It gets no work.", error)

    def _death_of(self, worker: _ActorHandle, error: Exception) -> Event:
        reason = " ".join(str(error).split())
        if not worker.is_ready and "No module named" in reason:
            raise UnsupportedError(f"{worker.machine} cannot run tempoquant ({reason}): install it there.")
        self.end(worker.number)
        return Event(worker.number, worker.node, "died", f"A worker on {worker.machine} died ({reason}).")
