"""Writing a quantized component, a layer at a time, so that memory does not grow with the model.

Everything goes to a temporary folder beside the target, which is renamed at the very end: a run that fails or is killed
leaves nothing that loads. The same inputs give the same bytes: no clock, no host name, no path is written.
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
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tempoquant.checkpoint import files
from tempoquant.checkpoint.schema import MAX_JSON_BYTES, Calibration, ComponentConfig, LayerEntry, check_name
from tempoquant.checkpoint.tensors import entry_of, to_stored
from tempoquant.errors import CheckpointError, OutputError
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import Recipe
from tempoquant.timesteps import Expert, TimestepBins

DEFAULT_SHARD_BYTES = 2 * 2**30  # also what the writer holds in memory at most, one tensor apart


class ComponentWriter:
    """Writes one component folder.

        with ComponentWriter(folder, expert=expert, bins=bins, recipe=recipe) as writer:
            writer.add_layer("blocks.0.attn1.to_q", layer)
            writer.add_tensor("proj_out.weight", weight)
            writer.finish(model_config)

    Leaving the block without `finish`, by an error or not, removes what was written. Every method raises OutputError
    when the disk refuses (full, read-only).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        expert: Expert,
        bins: TimestepBins,
        recipe: Recipe,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Prepare a temporary folder. Raises OutputError when the target exists and is not empty."""
        self.folder = Path(folder)
        self._expert, self._bins, self._recipe, self._max_shard_bytes = expert, bins, recipe, max_shard_bytes
        self._layers: dict[str, LayerEntry] = {}
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._num_bytes = 0
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise OutputError(f"{self.folder} exists and is not empty: remove it or choose another folder.")
        with _disk_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._partial = Path(
                tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".partial", dir=self.folder.parent)
            )

    def __enter__(self) -> "ComponentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove what was written; does nothing after `finish`."""
        self._pending = {}
        shutil.rmtree(self._partial, ignore_errors=True)

    def add_layer(self, name: str, layer: QuantizedLayer) -> None:
        """Store one 4-bit layer.

        Raises CheckpointError when a tensor of it is not what the format stores, or its bins are not the component's.
        """
        check_name(name)
        if layer.bins != self._bins:
            raise CheckpointError(
                f"{name} has bins {layer.bins.edges}, its component {self._bins.edges}: quantize both alike."
            )
        if name in self._layers:
            raise CheckpointError(f"layer {name} was added twice.")
        stored = to_stored(layer, name)
        self._layers[name] = entry_of(layer)
        for key, tensor in stored.items():
            self.add_tensor(f"{name}.{key}", tensor)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor as it is: a parameter or buffer of the 16-bit rest."""
        if name in self._pending or any(name in shard for shard in self._shards):
            raise CheckpointError(f"tensor {name} was added twice.")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes() + size > self._max_shard_bytes:
            self._flush()
        # A copy: the caller may free or reuse its memory before the shard is full.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._num_bytes += size

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
                self._expert, self._bins, dict(sorted(self._layers.items())), self._recipe, _library_version(),
                calibration, notes, {name: files.sha256_of(self._partial / name) for name in names},
            )  # fmt: skip
            # Through JSON and the reader's own checks: what cannot be read back must not be written.
            plain = json.loads(json.dumps(config.to_dict()))
            config = ComponentConfig.from_dict(plain, f"config of {self.folder}")
            self._write_json(files.CONFIG_NAME, {**model_config, "quantization_config": plain})
            _sync(self._partial)
            os.replace(self._partial, self.folder)
            _sync(self.folder.parent)
        return config

    def _pending_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._pending.values())

    def _flush(self) -> None:
        """Write the pending tensors as the next shard, under a name that says nothing about their number."""
        path = self._partial / f"{len(self._shards)}.safetensors"
        with _disk_errors(self.folder):
            # A fixed order: what comes out must not depend on how the caller found the tensors.
            save_file(dict(sorted(self._pending.items())), path, metadata={"format": "pt"})
            _sync(path)
        self._shards.append(sorted(self._pending))
        self._pending = {}

    def _name_shards(self) -> list[str]:
        """Give the shards diffusers' names, now that their number is known, and write the index of several."""
        total = len(self._shards)
        if total == 1:
            names = [files.WEIGHTS_NAME]
        else:
            names = [f"{files.WEIGHTS_STEM}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            self._write_json(files.INDEX_NAME, {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map})
        for i, name in enumerate(names):
            os.replace(self._partial / f"{i}.safetensors", self._partial / name)
        return names

    def _write_json(self, name: str, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        if len(text) > MAX_JSON_BYTES:
            raise CheckpointError(f"{name} would be larger than {MAX_JSON_BYTES} bytes: shorten calibration or notes.")
        path = self._partial / name
        path.write_text(text, encoding="utf-8")
        _sync(path)


def _library_version() -> str:
    try:
        return version("tempoquant")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def _sync(path: Path) -> None:
    """Have the disk keep a file or a folder's list of names, so that a rename never precedes what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{folder} cannot be written ({error}): free some space or choose another folder.") from error
