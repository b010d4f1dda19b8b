"""Writing of a quantized component, a layer at a time, so that memory does not grow with the model.

All files go to another folder, which is renamed to the target at the very end: a run that fails or
is killed leaves nothing that loads. With a journal, committed work survives, and a writer with the
same journal resumes from it. The same inputs give the same bytes: no clock, no host name, no path
is written.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from tempoquant.checkpoint import files
from tempoquant.checkpoint.checks import check_name
from tempoquant.checkpoint.journal import Commit, Journal
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.checkpoint.schema import Calibration, ComponentConfig, LayerEntry
from tempoquant.checkpoint.shards import DEFAULT_SHARD_BYTES, ShardWriter, disk_errors
from tempoquant.checkpoint.tensors import entry_of, to_stored
from tempoquant.errors import CheckpointError, OutputError
from tempoquant.layer import HardlySeen, QuantizedLayer
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins


class _Counts(NamedTuple):
    """The committed amounts."""

    commits: int = 0
    shards: int = 0
    layers: int = 0


class ComponentWriter:
    """Writes one component folder.

        with ComponentWriter(folder, denoiser=denoiser, bins=bins, recipe=recipe) as writer:
            writer.add_layer("blocks.0.attn1.to_q", layer)
            writer.add_tensor("proj_out.weight", weight)
            writer.finish(model_config)

    Leaving the block without `finish`, by an error or not, removes uncommitted work. Every method
    raises OutputError if the disk cannot be written (full, read-only).

    Attributes:
        layers: the 4-bit layers the component holds, by name, those of earlier writers included.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        denoiser: str,
        bins: TimestepBins,
        recipe: Recipe,
        call: ModelCall | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        journal: Journal | None = None,
    ) -> None:
        """Prepare a writer. Raises OutputError if the target exists and is not empty, or the
        journal's files are damaged.
        """
        self.folder = Path(folder)
        self._denoiser, self._bins, self._recipe, self._call = denoiser, bins, recipe, call
        self._journal = journal
        self.layers: dict[str, LayerEntry] = {}
        self._notes: tuple[str, ...] = ()
        self._hardly_seen: dict[str, HardlySeen] = {}
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise OutputError(f"{self.folder} exists and is not empty: remove it or choose another folder.")
        with disk_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if journal is None:
                self._partial = Path(
                    tempfile.mkdtemp(prefix=f".{self.folder.name}.", suffix=".partial", dir=self.folder.parent)
                )
            else:
                self._partial = journal.shard_folder
            commits = [] if journal is None else journal.open()
        shards = tuple(shard for commit in commits for shard in commit.shards)
        self._out = ShardWriter(self.folder, self._partial, max_shard_bytes, shards)
        for commit in commits:
            self.layers |= commit.layers
            self._notes += commit.notes
            self._hardly_seen |= commit.hardly_seen
        self._committed = _Counts(len(commits), len(shards), len(self.layers))

    def __enter__(self) -> "ComponentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()

    @property
    def num_commits(self) -> int:
        """Return the number of commits of the component, those of earlier writers included."""
        return self._committed.commits

    def abort(self) -> None:
        """Remove uncommitted work; does nothing after `finish`."""
        self._out.forget()
        if self._journal is None:
            shutil.rmtree(self._partial, ignore_errors=True)

    def commit(self, notes: tuple[str, ...] = (), hardly_seen: Mapping[str, HardlySeen] | None = None) -> None:
        """Make all additions so far outlive this process, in one step. Needs a journal.

        Args:
            notes: notes that the run stores.
            hardly_seen: layers with features that calibration hardly saw.
        """
        if self._journal is None:
            raise ValueError("a writer without a journal cannot commit")
        self._out.flush()
        done, shards = self._committed, self._out.shards
        layers = dict(list(self.layers.items())[done.layers :])
        seen = dict(hardly_seen or {})
        with disk_errors(self.folder):
            self._journal.add(done.commits, Commit(tuple(shards[done.shards :]), layers, notes, seen))
        self._notes += notes
        self._hardly_seen |= seen
        self._committed = _Counts(done.commits + 1, len(shards), len(self.layers))

    def add_layer(self, name: str, layer: QuantizedLayer) -> None:
        """Store one 4-bit layer.

        Raises CheckpointError if the format does not store a tensor of it, or its bins are not the
        component's.
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
        self._out.add(name, tensor)

    def finish(
        self,
        model_config: Mapping[str, Any],
        *,
        calibration: Calibration | None = None,
        notes: tuple[str, ...] = (),
        magnitude_ratios: MagnitudeRatios | None = None,
    ) -> ComponentConfig:
        """Write the last shard, the index and config.json, and move the folder to its place.

        Args:
            model_config: the source component's config.json, to which quantization_config is added.
        """
        config = ComponentConfig(
            self._denoiser,
            self._bins,
            dict(sorted(self.layers.items())),
            self._recipe,
            library_version(),
            calibration,
            self._notes + notes,
            self._out.name_shards(),
            self._hardly_seen,
            self._call,
            magnitude_ratios,
        )
        # Written through JSON and the reader's own checks: unreadable content must not be written.
        plain = json.loads(json.dumps(config.to_dict()))
        config = ComponentConfig.from_dict(plain, f"config of {self.folder}")
        self._out.write_json(files.CONFIG_NAME, {**model_config, "quantization_config": plain})
        self._out.place()
        if self._journal is not None:
            self._journal.remove()
        return config


def library_version() -> str:
    """Return the version of the running TempoQuant."""
    try:
        return version("tempoquant")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
