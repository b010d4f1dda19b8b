"""The connection to a running Ray cluster, made once there is work for it."""

import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import ray

from tempoquant.engines.crew import Crew, Job
from tempoquant.engines.ray_actors import RayActorPool
from tempoquant.engines.ray_membership import Membership, publishing
from tempoquant.errors import SettingsError

_CONNECT_TIMEOUT_S = 10.0
"""The longest time that the head node may take to accept a connection."""


class RayCrew(Crew):
    """Joins the cluster at its first work, which runs there: a run without work left needs no
    cluster.
    """

    def __init__(self, address: str | None, device: str, shared: Path, undo: contextlib.ExitStack) -> None:
        self._address, self._device, self._shared, self._undo = address, device, shared.resolve(), undo
        self._pool: Crew | None = None

    def run_job(self, job: Job) -> None:
        """Do every item of a job on the cluster; see `Crew.run_job`."""
        if self._pool is None:
            self._pool = self._join()
        self._pool.run_job(job)

    def _join(self) -> Crew:
        self._undo.enter_context(_connection(self._address))
        if self._device == "cuda" and not ray.cluster_resources().get("GPU"):
            raise SettingsError("no machine of the Ray cluster has a GPU: give --device cpu, or another --address.")
        membership = Membership.of_here(self._shared)
        self._undo.enter_context(publishing(membership))
        pool = RayActorPool(self._device, membership)
        self._undo.callback(pool.shut_down)
        return pool


@contextlib.contextmanager
def ray_crew(address: str | None, device: str, shared: Path) -> Iterator[Crew]:
    """Yield a crew on a cluster; the connection is closed with it, unless this process had one
    before.

    Its `run` raises SettingsError if there is no cluster at the address, or no GPU in it.
    """
    with contextlib.ExitStack() as undo:
        yield RayCrew(address, device, shared, undo)


@contextlib.contextmanager
def _connection(address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, here):
            raise SettingsError(f"this process is connected to the Ray cluster at {here}, not {address}.")
        yield
        return
    if address is not None:
        _require_answer(address)
    try:
        ray.init(address=address or "auto", logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(f"at {address}" if address else "that this machine belongs to", error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise SettingsError if nobody listens at the address; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise SettingsError(f"{address!r} is not HOST:PORT, as `ray start --head` printed it.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(f"at {address}", error) from error


def _no_cluster(where: str, error: Exception) -> SettingsError:
    reason = " ".join(str(error).split())
    return SettingsError(
        f"there is no Ray cluster {where} ({reason}): start one with `ray start --head`, or give its --address."
    )
