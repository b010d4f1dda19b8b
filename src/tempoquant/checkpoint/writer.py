"""Writing a quantized component, a layer at a time, so that memory does not grow with the model.

Everything goes to another folder, which is renamed to the target at the very end: a run that fails or is killed leaves
nothing that loads. With a journal, what was committed survives, and a writer with the same journal goes on from there.
The same inputs give the same bytes: no clock, no host name, no path is written.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tempoquant.checkpoint import files
from tempoquant.checkpoint.files import sync
from tempoquant.checkpoint.journal import Commit, Journal, Shard, shard_name
from tempoquant.checkpoint.schema import MAX_JSON_BYTES, Calibration, ComponentConfig, LayerEntry, check_name
from tempoquant.checkpoint.tensors import entry_of, to_stored
from tempoquant.errors import CheckpointError, OutputError
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert, TimestepBins

DEFAULT_SHARD_BYTES = 2 * 2**30  # also what the writer holds in memory at most, one tensor apart


class _Counts(NamedTuple):
    """How much is committed."""

    commits: int = 0
    shards: int = 0
    layers: int = 0


class ComponentWriter:
    """Writes one component folder.

        with ComponentWriter(folder, expert=expert, bins=bins, recipe=recipe) as writer:
            writer.add_layer("blocks.0.attn1.to_q", layer)
            writer.add_tensor("proj_out.weight", weight)
            writer.finish(model_config)

    Leaving the block without `finish`, by an error or not, removes what was not committed. Every method raises
    OutputError when the disk refuses (full, read-only).

    Attributes:
        layers: the 4-bit layers the component holds, by name, those of earlier writers included.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        expert: Expert,
        bins: TimestepBins,
        recipe: Recipe,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        journal: Journal | None = None,
    ) -> None:
        """Prepare. Raises OutputError when the target exists and is not empty, or what the journal names is damaged."""
        self.folder = Path(folder)
        self._expert, self._bins, self._recipe, self._max_shard_bytes = expert, bins, recipe, max_shard_bytes
        self._journal = journal
        self.layers: dict[str, LayerEntry] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[Shard] = []
        self._notes: tuple[str, ...] = ()
        self._committed = _Counts()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise OutputError(f"{self.folder} exists and is not empty: remove it or choose another folder.")
        with _disk_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if journal is None:
                self._partial = Path(
                    tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".partial", dir=self.folder.parent)
                )
            else:
                self._partial = journal.shard_folder
                self._adopt(journal.open())

    def __enter__(self) -> "ComponentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()

    @property
    def num_commits(self) -> int:
        """How many commits the component holds, those of earlier writers included."""
        return self._committed.commits

    def abort(self) -> None:
        """Remove what was not committed; does nothing after `finish`."""
        self._pending = {}
        if self._journal is None:
            shutil.rmtree(self._partial, ignore_errors=True)

    def commit(self, notes: tuple[str, ...] = ()) -> None:
        """Make all that was added so far outlive this process, in one step. Needs a journal."""
        if self._journal is None:
            raise ValueError("a writer without a journal cannot commit")
        if self._pending:
            self._flush()
        done = self._committed
        layers = dict(list(self.layers.items())[done.layers :])
        with _disk_errors(self.folder):
            self._journal.add(done.commits, Commit(tuple(self._shards[done.shards :]), layers, notes))
        self._notes += notes
        self._committed = _Counts(done.commits + 1, len(self._shards), len(self.layers))

    def _adopt(self, commits: list[Commit]) -> None:
        for commit in commits:
            self._shards += commit.shards
            self.layers |= commit.layers
            self._notes += commit.notes
        self._committed = _Counts(len(commits), len(self._shards), len(self.layers))

    def add_layer(self, name: str, layer: QuantizedLayer) -> None:
        """Store one 4-bit layer.

        Raises CheckpointError when a tensor of it is not what the format stores, or its bins are not the component's.
        """
        check_name(name)
        if layer.bins != self._bins:
            raise CheckpointError(
                f"{name} has bins {layer.bins.edges}, its component {self._bins.edges}: quantize both alike."
            )
        if name in self.layers:
            raise CheckpointError(f"layer {name} was added twice.")
        stored = to_stored(layer, name)
        self.layers[name] = entry_of(layer)
        for key, tensor in stored.items():
            self.add_tensor(f"{name}.{key}", tensor)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor as it is: a parameter or buffer of the 16-bit rest."""
        if name in self._pending or any(name in shard.tensors for shard in self._shards):
            raise CheckpointError(f"tensor {name} was added twice.")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes() + size > self._max_shard_bytes:
            self._flush()
        # A copy: the caller may free or reuse its memory before the shard is full.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()

    def finish(
        self,
        model_config: Mapping[str, Any],
        *,
        calibration: Calibration | None = None,
        notes: tuple[str, ...] = (),
    ) -> ComponentConfig:
        """Write the last shard, the index and config.json, and move the folder to its place.

        Args:
            model_config: the source component's config.json, to which quantization_config is added.
        """
        if self._pending or not self._shards:
            self._flush()
        with _disk_errors(self.folder):
            names = self._name_shards()
            config = ComponentConfig(
                self._expert, self._bins, dict(sorted(self.layers.items())), self._recipe, _library_version(),
                calibration, self._notes + notes,
                {name: shard.sha256 for name, shard in zip(names, self._shards, strict=True)},
            )  # fmt: skip
            # Through JSON and the reader's own checks: what cannot be read back must not be written.
            plain = json.loads(json.dumps(config.to_dict()))
            config = ComponentConfig.from_dict(plain, f"config of {self.folder}")
            self._write_json(files.CONFIG_NAME, {**model_config, "quantization_config": plain})
            sync(self._partial)
            os.replace(self._partial, self.folder)
            sync(self.folder.parent)
        if self._journal is not None:
            self._journal.remove()
        return config

    def _pending_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._pending.values())

    def _flush(self) -> None:
        """Write the pending tensors as the next shard, under a name that says nothing about their number."""
        path = self._partial / shard_name(len(self._shards))
        with _disk_errors(self.folder):
            # A fixed order: what comes out must not depend on how the caller found the tensors.
            save_file(dict(sorted(self._pending.items())), path, metadata={"format": "pt"})
            sync(path)
            self._shards.append(Shard(tuple(sorted(self._pending)), self._pending_bytes(), files.sha256_of(path)))
        self._pending = {}

    def _name_shards(self) -> list[str]:
        """Give the shards diffusers' names, now that their number is known, and write the index of several."""
        total = len(self._shards)
        if total == 1:
            names = [files.WEIGHTS_NAME]
        else:
            names = [f"{files.WEIGHTS_STEM}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
            shards = list(zip(names, self._shards, strict=True))
            weight_map = {tensor: name for name, shard in shards for tensor in shard.tensors}
            total_size = sum(shard.num_bytes for shard in self._shards)
            self._write_json(files.INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
        for i, name in enumerate(names):
            os.replace(self._partial / shard_name(i), self._partial / name)
        return names

    def _write_json(self, name: str, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        if len(text) > MAX_JSON_BYTES:
            raise CheckpointError(f"{name} would be larger than {MAX_JSON_BYTES} bytes: shorten calibration or notes.")
        path = self._partial / name
        path.write_text(text, encoding="utf-8")
        sync(path)


def _library_version() -> str:
    try:
        return version("tempoquant")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder} cannot be written ({error}): free some space or choose another folder.") from error
