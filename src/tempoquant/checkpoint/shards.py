"""Safetensors shards, written one tensor at a time, and a component folder that appears whole or
not at all.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tempoquant.checkpoint import files
from tempoquant.checkpoint.files import sync
from tempoquant.checkpoint.journal import Shard, shard_name
from tempoquant.checkpoint.schema import MAX_JSON_BYTES
from tempoquant.errors import CheckpointError, OutputError

DEFAULT_SHARD_BYTES = 2 * 2**30  # also the most held in memory, one tensor apart


class ShardWriter:
    """Writes shards to one folder, and moves that folder to its place when all are there.

    Every method raises OutputError if the disk cannot be written (full, read-only).

    Args:
        folder: the final folder.
        partial: an existing folder on the same disk, which holds the shards until then.
        shards: those that `partial` already holds, from number 0 on.

    Attributes:
        shards: the written ones, in the order of their numbers.
    """

    def __init__(
        self, folder: Path, partial: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES, shards: tuple[Shard, ...] = ()
    ) -> None:
        self.folder, self._partial, self._max_shard_bytes = folder, partial, max_shard_bytes
        self.shards = list(shards)
        self._pending: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor as it is. Raises CheckpointError if the name exists already."""
        if name in self._pending or any(name in shard.tensors for shard in self.shards):
            raise CheckpointError(f"tensor {name} was added twice.")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes() + size > self._max_shard_bytes:
            self.flush()
        # A copy, since the caller may free or reuse its memory before the shard is full.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def flush(self) -> None:
        """Write the pending tensors, if any, as the next shard."""
        if self._pending:
            self._write_shard()

    def forget(self) -> None:
        """Drop the tensors that are not in a shard yet."""
        self._pending = {}

    def name_shards(self) -> dict[str, str]:
        """Write the last shard, give all of them diffusers' names, and write an index if there are
        several.

        Returns:
            Each file's SHA-256.
        """
        if self._pending or not self.shards:
            self._write_shard()
        total = len(self.shards)
        if total == 1:
            names = [files.WEIGHTS_NAME]
        else:
            names = [f"{files.WEIGHTS_STEM}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
            weight_map = {
                tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard.tensors
            }
            total_size = sum(shard.num_bytes for shard in self.shards)
            self.write_json(files.INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
        with disk_errors(self.folder):
            for i, name in enumerate(names):
                os.replace(self._partial / shard_name(i), self._partial / name)
        return {name: shard.sha256 for name, shard in zip(names, self.shards, strict=True)}

    def write_json(self, name: str, record: Mapping[str, Any]) -> None:
        """Write one JSON file. Raises CheckpointError if a reader would refuse its size."""
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        if len(text) > MAX_JSON_BYTES:
            raise CheckpointError(f"{name} would be larger than {MAX_JSON_BYTES} bytes: shorten calibration or notes.")
        path = self._partial / name
        with disk_errors(self.folder):
            path.write_text(text, encoding="utf-8")
            sync(path)

    def place(self) -> None:
        """Move the folder to its place."""
        with disk_errors(self.folder):
            sync(self._partial)
            os.replace(self._partial, self.folder)
            sync(self.folder.parent)

    def _write_shard(self) -> None:
        """Write the pending shard, under a name that does not depend on the number of shards."""
        path = self._partial / shard_name(len(self.shards))
        with disk_errors(self.folder):
            # A fixed order: the result must not depend on how the caller found the tensors.
            save_file(dict(sorted(self._pending.items())), path, metadata={"format": "pt"})
            sync(path)
            self.shards.append(Shard(tuple(sorted(self._pending)), self._pending_bytes(), files.sha256_of(path)))
        self._pending = {}

    def _pending_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._pending.values())


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into an OutputError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder} cannot be written ({error}): free some space or choose another folder.") from error
