"""The requirements on every machine of a Ray cluster, relative to the one that started the run."""

import contextlib
import hashlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

_VISIBLE_TIMEOUT_S = 10.0
"""The longest time that a shared folder may take to show a new file on another machine."""

_TOKEN_PREFIX = ".seen-by-every-worker-"


@dataclass(frozen=True)
class Membership:
    """The requirements on a worker's machine. They are sent to every worker.

    Attributes:
        versions: of the computing packages.
        source: digest of this package's own files, which may differ between two checkouts of one
            version.
        token_file, token: in the folder of the results.
    """

    versions: dict[str, str]
    source: str
    token_file: Path
    token: str

    @classmethod
    def of_here(cls, shared: Path) -> "Membership":
        """Describe this machine, with a token that is not written yet, under a name that nobody has
        looked for.
        """
        token = uuid.uuid4().hex
        return cls(_versions(), _source_digest(), shared / f"{_TOKEN_PREFIX}{token[:8]}", token)

    def objection(self) -> str | None:
        """Return, on a worker's machine, the objection to its use, as words that follow its name;
        None for none.
        """
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
        until = time.monotonic() + _VISIBLE_TIMEOUT_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                return self.token_file.read_text(encoding="utf-8") == self.token
            time.sleep(0.2)
        return False


@contextlib.contextmanager
def publishing(membership: Membership) -> Iterator[None]:
    """Publish the token in the shared folder within this context; tokens of killed runs are
    removed.
    """
    for left in membership.token_file.parent.glob(f"{_TOKEN_PREFIX}*"):
        left.unlink(missing_ok=True)
    membership.token_file.write_text(membership.token, encoding="utf-8")
    try:
        yield
    finally:
        membership.token_file.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tempoquant", "torch", "diffusers", "transformers")}


def _source_digest() -> str:
    sources = sorted(Path(str(files("tempoquant"))).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
