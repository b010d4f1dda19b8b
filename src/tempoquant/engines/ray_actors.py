"""Workers on a Ray cluster: one actor for each GPU, or for each machine that computes on its CPU.

Imported only where somebody asked for Ray, which is optional.
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

from tempoquant.engines.host import Host
from tempoquant.engines.ray_cluster import Membership
from tempoquant.engines.stage import Event, Message, Order
from tempoquant.engines.team import MOST_FAILURES, Team
from tempoquant.errors import TempoQuantError, UnsupportedError

_PATIENCE_S = 60.0
"""How long a cluster may be without any usable machine: one that restarts takes its time."""

_LOOK_S = 5.0
"""Between looks at which machines there are."""

_START_S = 30.0
"""A worker that takes longer to start may be waiting for what others use: one is tried elsewhere meanwhile."""

_logger = logging.getLogger(__name__)


class _Actor:
    """What runs on the cluster. Orders are done in a thread of their own, so that it can be asked meanwhile."""

    def __init__(self, device: str) -> None:
        self._messages: deque[Message] = deque()
        self._draining = threading.Lock()
        self._host = Host(device, self._messages.append)

    @ray.method(concurrency_group="work")
    def join(self, membership: Membership, num_threads: int) -> str | None:
        """Be ready for orders; why not, if this machine is not as it has to be."""
        torch.set_num_threads(num_threads)  # Ray allows as many as CPUs were asked for
        return membership.objection()

    @ray.method(concurrency_group="work")
    def do(self, order: Order) -> list[Message]:
        """The messages that nobody has fetched yet; the last one says how the order ended."""
        self._host.do(order)
        return self._drain()

    @ray.method(concurrency_group="talk")
    def messages(self) -> list[Message]:
        """Those since they were last asked for, but none that ends an order: `do` gives that itself."""
        return self._drain(but_last=True)

    def _drain(self, but_last: bool = False) -> list[Message]:
        found = []
        with self._draining:
            while self._messages and not (but_last and self._messages[0].ends_order):
                found.append(self._messages.popleft())
        return found


@dataclass
class _Worker:
    """promise: of what it is doing now, at first of joining; None when it is idle. talk: of its messages."""

    number: int
    node: str
    machine: str
    actor: Any
    promise: Any
    is_ready: bool = False
    talk: Any = None
    began: float = field(default_factory=time.monotonic)


class RayActors(Team):
    """A worker for each place on the cluster, on machines that join later too. A place, to blame, is a whole machine.

    Args:
        device: "cuda" or "cpu".
        membership: what every worker has to have in common with this machine.
    """

    def __init__(self, device: str, membership: Membership) -> None:
        super().__init__()
        self._device, self._membership = device, membership
        self._workers: dict[int, _Worker] = {}
        self._has_been_ready = False
        self._last_look = -_LOOK_S
        self._last_usable = self._last_ready = time.monotonic()

    def recruit(self, num_items: int) -> None:
        """See `Team.recruit`."""
        now = time.monotonic()
        if now - self._last_look < _LOOK_S:
            return
        self._last_look = now
        self._give_back_surplus(num_items)
        nodes = [node for node in ray.nodes() if node["Alive"] and self._num_places(node)]
        usable = [node for node in nodes if self.is_usable(node["NodeID"])]
        # Machine by machine, so that models are loaded from many disks and networks at once. Who does not start in time
        # may be waiting for somebody else's work to end.
        counting = sum(worker.is_ready or now - worker.began < _START_S for worker in self._workers.values())
        for place in range(max(map(self._num_places, usable), default=0)):
            for node in usable:
                there = sum(worker.node == node["NodeID"] for worker in self._workers.values())
                if counting < num_items and there <= place < self._num_places(node):
                    self._start(node)
                    counting += 1
        self._lament(now, bool(nodes), bool(usable))

    def idle(self) -> list[int]:
        """See `Team.idle`."""
        return [worker.number for worker in self._workers.values() if worker.promise is None]

    def place(self, worker: int) -> str:
        """See `Team.place`."""
        return self._workers[worker].node

    def give(self, worker: int, order: Order) -> None:
        """See `Team.give`."""
        self._workers[worker].promise = self._workers[worker].actor.do.remote(order)

    def events(self, timeout_s: float) -> list[Event]:
        """See `Team.events`."""
        promises = {worker.promise: worker for worker in self._workers.values() if worker.promise is not None}
        if not promises:
            time.sleep(timeout_s)  # every machine is gone: `recruit` waits for one
            return []
        finished, _ = ray.wait(list(promises), num_returns=1, timeout=timeout_s)
        found = [event for worker in self._workers.values() for event in self._talk(worker)]
        for promise in finished:
            found += self._ended(promises[promise])
        return found

    def end(self, worker: int) -> None:
        """See `Team.end`. A machine that cannot be reached may only be cut off; its worker dies when it is back."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._workers.pop(worker).actor)

    def dismiss(self) -> None:
        """See `Team.dismiss`."""
        for worker in list(self._workers):
            self.end(worker)
        self._last_look = -_LOOK_S

    def _num_places(self, node: dict[str, Any]) -> int:
        resources = node["Resources"]
        return int(resources.get("GPU", 0)) if self._device == "cuda" else int(resources.get("CPU", 0) >= 1)

    def _give_back_surplus(self, num_items: int) -> None:
        """Those that were started elsewhere meanwhile, and are still waiting, once there are enough."""
        if sum(worker.is_ready for worker in self._workers.values()) >= num_items:
            for worker in [worker for worker in self._workers.values() if not worker.is_ready]:
                self.end(worker.number)

    def _lament(self, now: float, are_there: bool, are_usable: bool) -> None:
        """Raise where no worker is left and none can be had; warn where none is ready for long."""
        if are_usable or self._workers:
            self._last_usable = now
        elif are_there:
            raise self.last_failure
        elif now - self._last_usable > _PATIENCE_S:
            raise TempoQuantError(
                f"no machine of the Ray cluster is left that can work with {self._device}: see `ray status`. What is "
                "finished is kept, and the same command goes on."
            )
        if any(worker.is_ready for worker in self._workers.values()):
            self._last_ready = now
        elif now - self._last_ready > _PATIENCE_S:
            self._last_ready = now
            _logger.warning("still waiting for machines of the Ray cluster: do others use them (`ray status`)?")

    def _start(self, node: dict[str, Any]) -> None:
        num_threads = max(1, int(node["Resources"].get("CPU", 0)) // self._num_places(node))
        actor = (
            ray.remote(concurrency_groups={"work": 1, "talk": 1})(_Actor)
            .options(
                num_cpus=1,  # all of them would be had only where nobody else works
                num_gpus=int(self._device == "cuda"),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(self._device)
        )
        number, promise = self.next_number(), actor.join.remote(self._membership, num_threads)
        self._workers[number] = _Worker(number, node["NodeID"], node["NodeManagerAddress"], actor, promise)

    def _talk(self, worker: _Worker) -> list[Event]:
        """Messages of an order that goes on."""
        if worker.promise is None or not worker.is_ready:
            return []
        messages = []
        if worker.talk is not None and ray.wait([worker.talk], timeout=0)[0]:
            messages = self._fetch(worker)
        if worker.talk is None:
            worker.talk = worker.actor.messages.remote()
        return [Event(worker.number, worker.node, *message) for message in messages]

    def _fetch(self, worker: _Worker) -> list[Message]:
        """The messages that were asked for; none where the worker has died since, as its promise will say."""
        talk, worker.talk = worker.talk, None
        with contextlib.suppress(ray.exceptions.RayError):
            return list(ray.get(talk))
        return []

    def _ended(self, worker: _Worker) -> list[Event]:
        """What a worker was doing has ended, well or not."""
        try:
            result = ray.get(worker.promise)
        except ray.exceptions.RayError as error:
            return [self._died(worker, error)]
        worker.promise = None
        if worker.is_ready:
            fetched = [] if worker.talk is None else self._fetch(worker)
            return [Event(worker.number, worker.node, *message) for message in [*fetched, *result]]
        if result is not None:
            self._refuse(worker, UnsupportedError(f"{worker.machine} {result}"))
            return []
        worker.is_ready = self._has_been_ready = True
        return []

    def _refuse(self, worker: _Worker, error: TempoQuantError) -> None:
        """A machine is not as it has to be: a mistake to hear of at once, but none that ends hours of work."""
        self.end(worker.number)
        if not self._has_been_ready:
            raise error
        self.failures[worker.node], self.last_failure = MOST_FAILURES, error
        _logger.warning("%s It gets no work.", error)

    def _died(self, worker: _Worker, error: Exception) -> Event:
        reason = " ".join(str(error).split())
        if not worker.is_ready and "No module named" in reason:
            raise UnsupportedError(f"{worker.machine} cannot run tempoquant ({reason}): install it there.")
        self.end(worker.number)
        return Event(worker.number, worker.node, "died", f"A worker on {worker.machine} died ({reason}).")
