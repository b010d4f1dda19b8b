"""Fetch models from the Hugging Face hub into its cache, and say in words why one is refused."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tempoquant.checkpoint.files import sha256_of
from tempoquant.checkpoint.manifest import MANIFEST_NAME, read_manifest
from tempoquant.errors import CheckpointError, ModelError

_COMPARED = ".tempoquant-compared"
"""Folder in a model's cache: for each file that was compared, by its SHA-256, its size and time."""


def split_revision(name: str) -> tuple[str, str | None]:
    """Split "org/name@revision", as the hub's own URLs have it; the revision may be None."""
    hub_id, at, revision = name.partition("@")
    return hub_id, revision if at else None


def is_hub_id(name: str) -> bool:
    """Tell whether a text has the form of a hub id, "org/name" or "org/name@revision"."""
    hub_id, revision = split_revision(name)
    parts = hub_id.split("/")
    return len(parts) == 2 and all(parts) and not hub_id.startswith(".") and "\\" not in hub_id and revision != ""


def revision_of(folder: Path) -> str | None:
    """Return the commit of a snapshot in the hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """Return the folder in the hub's cache that holds the files of a model that match.

    A connection that breaks is resumed. Files of an interrupted download that arrived whole are not
    fetched again. Every file in the cache is compared once with the SHA-256 that the checkpoint's
    tempoquant.json states, if it has one. Bars show the download on a terminal.

    Args:
        name: "org/name", or "org/name@revision" for a branch, a tag or a commit.
        patterns: of the files' names, such as "*.json".

    Raises:
        ModelError: the model cannot be fetched, and is not in the cache.
        CheckpointError: a downloaded file is not the one that was published; it is removed.
    """
    from huggingface_hub import snapshot_download

    hub_id, revision = split_revision(name)
    try:
        with _bars_on_terminals():
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub, of the disk, or of one of three HTTP libraries, by the hub's version
        raise ModelError(why_not_fetched(error, name)) from error
    with _bars_on_terminals():
        _compare_once(folder)
    return folder


def why_not_fetched(error: Exception, name: str) -> str:
    """Return the sentence for a model that could not be fetched."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub_id, revision = split_revision(name)
    start = f"{name} is neither a folder here nor could it be fetched from the hub"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{name} is neither a folder here nor whole in the hub's cache ({constants.HF_HUB_CACHE}), and "
            f"HF_HUB_OFFLINE forbids to fetch it: unset it, or run `hf download {hub_id}` where there is a network."
        )
    if isinstance(error, GatedRepoError):
        return f"{start}: it is gated; accept its conditions at {constants.ENDPOINT}/{hub_id}, then `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return f"{start}: the hub has no such model, or hides it; check the name, or log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{start}: it has no revision {revision}; see {constants.ENDPOINT}/{hub_id}/commits/main."
    if isinstance(error, HFValidationError):
        return f"{start}: {error}"
    return f"{start} ({first_line(error)}). Files that arrived whole are kept: the same command fetches the rest."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or its class's name."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0].strip() if lines else type(error).__name__).rstrip(".")


@contextlib.contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Show the hub's own bars, with the time that is left, where stderr is a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not are_progress_bars_disabled() or not sys.stderr.isatty():
        yield
        return
    enable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars()


def _compare_once(folder: Path) -> None:
    """Compare the files of a snapshot with the checkpoint's hashes, each file once.

    The hub's client compares sizes alone. Nothing is compared in a cache that this user cannot
    write: others filled it.

    Raises:
        CheckpointError: a file differs. It is removed, so that it is fetched again.
    """
    from huggingface_hub.utils import tqdm

    compared = folder.parent.parent / _COMPARED
    if not (folder / MANIFEST_NAME).is_file() or not os.access(compared.parent, os.W_OK):
        return
    digests = {folder / name: digest for name, digest in sorted(read_manifest(folder).sha256.items())}
    new = {file: digest for file, digest in digests.items() if file.is_file() and not _is_noted(compared, file, digest)}
    compared.mkdir(exist_ok=True)
    for file, digest in tqdm(new.items(), desc="Comparing with the publisher's hashes", disable=not new):
        if sha256_of(file) == digest:
            (compared / digest).write_text(_size_and_time(file))
            continue
        blob = file.resolve()
        file.unlink()
        blob.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.relative_to(folder).as_posix()} of {folder.name} arrived otherwise than it was published (SHA-256 "
            "differs), and was removed: the same command fetches it again."
        )


def _is_noted(compared: Path, file: Path, digest: str) -> bool:
    note = compared / digest
    return note.is_file() and note.read_text() == _size_and_time(file)


def _size_and_time(file: Path) -> str:
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}"
