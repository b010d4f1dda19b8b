"""Which Ray cluster, and what its machines have to have in common with this one."""

import contextlib
import hashlib
import logging
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import ray

from tempoquant.engines.crew import Crew, Job
from tempoquant.errors import SettingsError

_ANSWER_S = 10.0
"""How long somebody may take to accept a connection, and a shared folder to show a new file."""

_TOKEN = ".seen-by-every-worker-"


@dataclass(frozen=True)
class Membership:
    """Sent to every worker.

    Attributes:
        versions: of what computes, by package.
        source: digest of this package's own files, which two checkouts of one version can differ in.
        token_file, token: in the folder that results go to.
    """

    versions: dict[str, str]
    source: str
    token_file: Path
    token: str

    @classmethod
    def of_here(cls, shared: Path) -> "Membership":
        """With a token that has yet to be written, under a name that nobody has looked for before."""
        token = uuid.uuid4().hex
        return cls(_versions(), _source_digest(), shared / f"{_TOKEN}{token[:8]}", token)

    def objection(self) -> str | None:
        """Asked on a worker's machine: what keeps it from working, in words that follow the machine's name."""
        for name, found in _versions().items():
            if found != self.versions[name]:
                return f"has {name} {found}, and the machine that started this {self.versions[name]}: install the same."
        if _source_digest() != self.source:
            return "has other source files of tempoquant, of the same version: install the same on every machine."
        if not self._is_seen():
            return (
                f"does not see {self.token_file.parent}: write the results (-o) to a folder that all machines of the "
                "cluster share, under the same path."
            )
        return None

    def _is_seen(self) -> bool:
        until = time.monotonic() + _ANSWER_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                return self.token_file.read_text(encoding="utf-8") == self.token
            time.sleep(0.2)
        return False


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tempoquant", "torch", "diffusers", "transformers")}


def _source_digest() -> str:
    sources = sorted(Path(str(files("tempoquant"))).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()


class Connected(Crew):
    """A crew that joins the cluster when it gets work: a run that has none left needs no cluster."""

    def __init__(self, address: str | None, device: str, shared: Path, undo: contextlib.ExitStack) -> None:
        self._address, self._device, self._shared, self._undo = address, device, shared.resolve(), undo
        self._team: Crew | None = None

    def work_off(self, job: Job) -> None:
        """See `Crew.work_off`."""
        if self._team is None:
            self._team = self._join()
        self._team.work_off(job)

    def _join(self) -> Crew:
        from tempoquant.engines.ray_actors import RayActors

        self._undo.enter_context(_connection(self._address))
        if self._device == "cuda" and not ray.cluster_resources().get("GPU"):
            raise SettingsError("no machine of the Ray cluster has a GPU: give --device cpu, or another --address.")
        membership = Membership.of_here(self._shared)
        for left in self._shared.glob(f"{_TOKEN}*"):  # by a run that was killed
            left.unlink(missing_ok=True)
        membership.token_file.write_text(membership.token, encoding="utf-8")
        self._undo.callback(membership.token_file.unlink, missing_ok=True)
        team = RayActors(self._device, membership)
        self._undo.callback(team.dismiss)
        return team


@contextlib.contextmanager
def connected(address: str | None, device: str, shared: Path) -> Iterator[Crew]:
    """A crew on a cluster; the connection is closed with it, unless this process had one before.

    Its `run` raises SettingsError where there is no cluster at the address, or no GPU in it.
    """
    with contextlib.ExitStack() as undo:
        yield Connected(address, device, shared, undo)


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
    """Raise SettingsError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
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
