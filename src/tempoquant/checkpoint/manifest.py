"""tempoquant.json at the root of a quantized pipeline: the run that wrote it, and the SHA-256 of
every file.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tempoquant.checkpoint import files
from tempoquant.errors import CheckpointError

MANIFEST_NAME = "tempoquant.json"


@dataclass(frozen=True)
class Manifest:
    """The expected content of a pipeline folder.

    Attributes:
        run: identifies the run: recipe, source, prompts, seed, library version.
        sha256: path relative to the folder, with forward slashes, to hexadecimal SHA-256.
    """

    run: dict[str, Any]
    sha256: dict[str, str]


def write_manifest(folder: Path, run: dict[str, Any]) -> None:
    """Hash every file below a folder, and write the manifest into it."""
    found = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST_NAME)
    hashes = {file.relative_to(folder).as_posix(): files.sha256_of(file) for file in found}
    text = json.dumps({"run": run, "sha256": hashes}, indent=1, sort_keys=True)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest. Raises CheckpointError if it is missing, malformed, or names
    files elsewhere.
    """
    path = folder / MANIFEST_NAME
    record = files.read_json(path)
    run, hashes = record.get("run"), record.get("sha256")
    if set(record) != {"run", "sha256"} or not isinstance(run, dict) or not isinstance(hashes, dict):
        raise CheckpointError(f"{path} does not hold run and sha256: the file is damaged, fetch it again.")
    for name, digest in hashes.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path} lists {name[:80]!r}, which could lie outside the folder: refused.")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise CheckpointError(
                f"{path}: the hash of {name[:80]} is not 64 hexadecimal digits: fetch the file again."
            )
    return Manifest(run, hashes)


def missing_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return listed files that do not exist."""
    return [name for name in sorted(manifest.sha256) if not (folder / name).is_file()]


def verify_manifest(folder: Path, but: Collection[str] = ()) -> list[str]:
    """Compare every listed file with its hash, and return the names of those compared.

    Args:
        but: names of files that have to be there, and may hold something else.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    manifest = read_manifest(folder)
    for name in missing_files(folder, manifest):
        raise CheckpointError(f"{folder / name} is missing: fetch the folder again.")
    compared = {name: digest for name, digest in sorted(manifest.sha256.items()) if name not in but}
    for name, digest in compared.items():
        if files.sha256_of(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} is not the file that was written (SHA-256 differs): fetch it again."
            )
    return list(compared)
