"""Workers on a Ray cluster: one actor for each GPU, or for each machine that computes on its CPU.

Imported only where somebody asked for Ray, which is optional.
"""

import contextlib
import logging
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tempoquant.engines.host import Host
from tempoquant.engines.stage import Event, Message, Order
from tempoquant.engines.team import Team
from tempoquant.errors import OutputError, SettingsError, TempoQuantError, UnsupportedError

MOST_FAILED_STARTS = 2
"""A machine on which so many workers in a row died before they were ready is left alone."""

_PATIENCE_S = 60.0
"""How long a cluster may be without any usable machine: one that restarts takes its time."""

_ANSWER_S = 10.0
"""How long somebody may take to accept a connection."""

_LOOK_S = 5.0
"""Between looks at which machines there are."""

_TOKEN = ".seen-by-every-worker"

_logger = logging.getLogger(__name__)


class _Actor:
    """What runs on the cluster. Orders are done in a thread of their own, so that it can be asked meanwhile."""

    def __init__(self, device: str) -> None:
        self._messages: deque[Message] = deque()
        self._draining = threading.Lock()
        self._host = Host(device, self._messages.append)

    @ray.method(concurrency_group="work")
    def facts(self, token: str) -> tuple[str, str | None]:
        """Its version of this package, and what it reads in the token file; None when it sees none."""
        with contextlib.suppress(OSError):
            return version("tempoquant"), Path(token).read_text(encoding="utf-8")
        return version("tempoquant"), None

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
    """promise: of what it is doing now, at first of its facts; None when it is idle. talk: of its messages."""

    number: int
    node: str
    machine: str
    actor: Any
    promise: Any
    is_ready: bool = False
    talk: Any = None


class RayActors(Team):
    """A worker for each place on the cluster, on machines that join later too.

    Args:
        device: "cuda" or "cpu".
        token_file, token: what every worker must be able to read.
    """

    def __init__(self, device: str, token_file: Path, token: str) -> None:
        super().__init__()
        self._device, self._token_file, self._token = device, token_file, token
        self._workers: dict[int, _Worker] = {}
        self._failed_starts: Counter[str] = Counter()
        self._last_look = -_LOOK_S
        self._last_usable = self._last_ready = time.monotonic()

    def recruit(self, num_items: int) -> None:
        """See `Team.recruit`."""
        now = time.monotonic()
        if now - self._last_look < _LOOK_S:
            return
        self._last_look = now
        nodes = [node for node in ray.nodes() if node["Alive"] and self._num_places(node)]
        usable = [node for node in nodes if self._failed_starts[node["NodeID"]] < MOST_FAILED_STARTS]
        for node in usable:
            there = sum(worker.node == node["NodeID"] for worker in self._workers.values())
            for _ in range(self._num_places(node) - there):
                if len(self._workers) < num_items:
                    self._start(node)
        if usable:
            self._last_usable = now
        elif nodes or now - self._last_usable > _PATIENCE_S:
            raise TempoQuantError(
                f"no machine of the Ray cluster is left that can work with {self._device}: see `ray status`. What is "
                "finished is kept, and the same command goes on."
            )
        if any(worker.is_ready for worker in self._workers.values()):
            self._last_ready = now
        elif now - self._last_ready > _PATIENCE_S:
            self._last_ready = now
            _logger.warning("still waiting for machines of the Ray cluster: do others use them (`ray status`)?")

    def idle(self) -> list[int]:
        """See `Team.idle`."""
        return [worker.number for worker in self._workers.values() if worker.promise is None]

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

    def dismiss(self) -> None:
        """See `Team.dismiss`."""
        for worker in self._workers.values():
            ray.kill(worker.actor)
        self._workers = {}

    def _num_places(self, node: dict[str, Any]) -> int:
        resources = node["Resources"]
        return int(resources.get("GPU", 0)) if self._device == "cuda" else int(resources.get("CPU", 0) >= 1)

    def _start(self, node: dict[str, Any]) -> None:
        num_cpus = int(node["Resources"].get("CPU", 0)) // max(1, self._num_places(node))
        actor = (
            ray.remote(concurrency_groups={"work": 1, "talk": 1})(_Actor)
            .options(
                num_cpus=num_cpus,  # Ray gives an actor as many threads
                num_gpus=int(self._device == "cuda"),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(self._device)
        )
        number, promise = self.next_number(), actor.facts.remote(str(self._token_file))
        self._workers[number] = _Worker(number, node["NodeID"], node["NodeManagerAddress"], actor, promise)

    def _talk(self, worker: _Worker) -> list[Event]:
        """Messages of an order that goes on."""
        if worker.promise is None or not worker.is_ready:
            return []
        messages = []
        if worker.talk is not None and ray.wait([worker.talk], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):  # it has died, and its promise will say so
                messages = ray.get(worker.talk)
            worker.talk = None
        if worker.talk is None:
            worker.talk = worker.actor.messages.remote()
        return [Event(worker.number, *message) for message in messages]

    def _ended(self, worker: _Worker) -> list[Event]:
        """What a worker was doing has ended, well or not."""
        try:
            result = ray.get(worker.promise)
        except ray.exceptions.RayError as error:
            return [self._died(worker, error)]
        worker.promise = None
        if worker.is_ready:
            fetched = [] if worker.talk is None else self._fetch(worker)
            return [Event(worker.number, *message) for message in [*fetched, *result]]
        self._check(worker, *result)
        worker.is_ready = True
        self._failed_starts[worker.node] = 0
        return []

    def _fetch(self, worker: _Worker) -> list[Message]:
        """The last messages that were asked for before the order ended; none where the worker has died since."""
        talk, worker.talk = worker.talk, None
        with contextlib.suppress(ray.exceptions.RayError):
            return list(ray.get(talk))
        return []

    def _check(self, worker: _Worker, found: str, token: str | None) -> None:
        """Raise unless a worker has this version of the package and sees the shared folder."""
        if found != version("tempoquant"):
            raise UnsupportedError(
                f"{worker.machine} has tempoquant {found}, this machine {version('tempoquant')}: install the same."
            )
        if token != self._token:
            raise OutputError(
                f"{worker.machine} does not see {self._token_file.parent}: choose a folder that all machines of the "
                "cluster share, under the same path."
            )

    def _died(self, worker: _Worker, error: Exception) -> Event:
        """A machine that cannot be reached may only be cut off; its worker is killed when it is back."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(worker.actor)
        del self._workers[worker.number]
        reason = " ".join(str(error).split())
        if not worker.is_ready:
            self._failed_starts[worker.node] += 1
            if "No module named" in reason:
                raise UnsupportedError(f"{worker.machine} cannot run tempoquant ({reason}): install it there.")
            _logger.warning("a worker on %s did not start: %s", worker.machine, reason)
        return Event(worker.number, "died", f"A worker on {worker.machine} died ({reason}).")


@contextlib.contextmanager
def connected(address: str | None, device: str, shared: Path) -> Iterator[RayActors]:
    """A crew on a cluster; the connection is closed with it, unless this process had one before.

    Raises:
        SettingsError: there is no cluster at the address, or no GPU in it.
    """
    had_connection = ray.is_initialized()
    if address is not None and not had_connection:
        _require_answer(address)
    if not had_connection:
        try:
            ray.init(address=address or "auto", logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_cluster(f"at {address}" if address else "that this machine belongs to", error) from error
    token_file, token = shared.resolve() / _TOKEN, uuid.uuid4().hex
    try:
        if device == "cuda" and not ray.cluster_resources().get("GPU"):
            raise SettingsError("no machine of the Ray cluster has a GPU: give --device cpu, or another --address.")
        token_file.write_text(token, encoding="utf-8")
        team = RayActors(device, token_file, token)
        try:
            yield team
        finally:
            team.dismiss()
    finally:
        token_file.unlink(missing_ok=True)
        if not had_connection:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise SettingsError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise SettingsError(f"{address!r} is not HOST:PORT, as `ray start --head` printed it.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(f"at {address}", error) from error


def _no_cluster(where: str, error: Exception) -> SettingsError:
    reason = " ".join(str(error).split())
    return SettingsError(
        f"there is no Ray cluster {where} ({reason}): start one with `ray start --head`, or give its --address."
    )
