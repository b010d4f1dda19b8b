"""Identity of a pipeline on disk: a hash of its whole content, or of its files' names and sizes."""

import hashlib
import re
from pathlib import Path
from typing import Any

from tempoquant.checkpoint.files import sha256_of
from tempoquant.models.source import SourceModel
from tempoquant.progress import SILENT, Progress


def fingerprint(source: SourceModel, progress: Progress = SILENT) -> str:
    """Return the SHA-256 over the names and contents of the files of a pipeline's components, and
    over its LoRAs.
    """
    found = _files_of(source)
    advance = progress.start("Identifying the model", len(found))
    digest = hashlib.sha256()
    for name, file in found.items():
        digest.update(f"{name}:{_content_hash(file)}\n".encode())
        advance()
    _add_loras(source, digest)
    return digest.hexdigest()


def outline(source: SourceModel) -> str:
    """Return the SHA-256 over names and sizes of the components' files, their .json, and LoRAs:
    reads no weights.
    """
    digest = hashlib.sha256()
    for name, file in _files_of(source).items():
        content = sha256_of(file) if file.suffix == ".json" else ""
        digest.update(f"{name}:{file.stat().st_size}:{content}\n".encode())
    _add_loras(source, digest)
    return digest.hexdigest()


def _add_loras(source: SourceModel, digest: Any) -> None:
    for name, lora in sorted(source.loras.items()):
        digest.update(f"LoRAs of {name}:{lora.sha256}\n".encode())


def _files_of(source: SourceModel) -> dict[str, Path]:
    """Return the components' files in order, by names that tell their places."""
    return {key: file for name in sorted(source.components) for key, file in source.components[name].files().items()}


def _content_hash(file: Path) -> str:
    """Return the SHA-256 of a file. The hub's cache names large files by it, which saves reading
    them.
    """
    target = file.resolve()
    is_named = target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name)
    return target.name if is_named else sha256_of(file)
