"""Unfinished work: a folder beside its target, owned by one live process, continued by the same run
and no other.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tempoquant.errors import OutputError

SUFFIX = ".unfinished"
_LOCK, _OWNER, _IDENTITY = "lock", "owner", "run.json"
_OUR_FILES = {_LOCK, _OWNER, _IDENTITY, f"{_IDENTITY}.partial"}


class WorkFolder:
    """The folder of a run's finished work so far: `TARGET.unfinished`, beside the target, so that
    the result can appear there in one rename.

    Args:
        target: the final result.
        identity: JSON values that make two runs the same run.
    """

    def __init__(self, target: Path, identity: Mapping[str, Any]) -> None:
        self.target = target
        self.path = target.with_name(target.name + SUFFIX)
        self._identity = json.loads(json.dumps(dict(identity)))

    @contextlib.contextmanager
    def owned(self, overwrite: bool = False) -> Iterator[Path]:
        """Own the folder within this context: create it if it is new, continue it if it is this
        run's.

        The operating system's lock ends with its owner, however that ends. The run's files stay in
        the folder at the end of the context; `remove` is for the end of the work.

        Args:
            overwrite: discard another run's unfinished work.

        Raises:
            OutputError: another live process owns it, it holds another run's work (the difference
                is named) or something that no run wrote, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK, timeout=0)
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"another process{self._owner()} is working in {self.path}: wait for it, stop it, or choose another "
                "output."
            ) from error
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        try:
            (self.path / _OWNER).write_text(str(os.getpid()), encoding="utf-8")
            self._claim(overwrite)
            yield self.path
        finally:
            lock.release()

    def remove(self) -> None:
        """Remove the folder and everything in it, the identity last, which `tidy` needs after a
        kill.
        """
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != _IDENTITY:
                entry.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def tidy(self) -> None:
        """Remove the folder if this run left it, killed after its result was in place."""
        with contextlib.suppress(OSError):
            self.path.rmdir()  # only an empty folder can be removed so
        if self.path.is_dir() and self._differences(self.path / _IDENTITY, overwrite=True) == []:
            with contextlib.suppress(OutputError), self.owned():
                self.remove()

    def _claim(self, overwrite: bool) -> None:
        """Make the folder this run's, or check that it is."""
        file = self.path / _IDENTITY
        different = self._differences(file, overwrite)
        if different and not overwrite:
            raise OutputError(
                f"{self.path} holds the unfinished work of another run (different {' and '.join(different)}): "
                "choose another output, or --overwrite."
            )
        others = [entry for entry in self.path.iterdir() if entry.name not in _OUR_FILES]
        if different is None and others and not overwrite:
            raise OutputError(f"{self.path} holds {others[0].name}, which no run wrote: choose another output.")
        if different is None or different:
            for entry in others:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_atomically(file, json.dumps(self._identity, indent=1, sort_keys=True) + "\n")

    def _differences(self, file: Path, overwrite: bool) -> list[str] | None:
        """Return the differences between this run and the folder's; None if the folder belongs to
        none.
        """
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            keys = sorted(set(found) | set(self._identity))
            return [key for key in keys if found.get(key) != self._identity.get(key)]
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if overwrite:
                return None
            raise OutputError(f"{file} cannot be read ({error}): remove {self.path}, or --overwrite.") from error

    def _owner(self) -> str:
        try:
            pid = (self.path / _OWNER).read_text(encoding="utf-8").strip()
        except OSError:
            return ""
        return f" (number {pid})" if pid else ""


def write_atomically(file: Path, text: str) -> None:
    """Write a text file that is either absent or whole, also after a power cut."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
