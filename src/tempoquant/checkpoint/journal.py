"""The journal of an unfinished component: its commits, so that another process can resume after a
kill.

A journal is a folder with a file for each commit. The file is written last and in one rename, so
the data that it names is complete on disk.
"""

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempoquant.checkpoint import files
from tempoquant.checkpoint.checks import REMEDY
from tempoquant.checkpoint.files import sync
from tempoquant.checkpoint.hardly_seen import hardly_seen_from_dict, hardly_seen_to_dict
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.errors import CheckpointError, OutputError
from tempoquant.layer import HardlySeen


@dataclass(frozen=True)
class Shard:
    """One finished weight file: its tensors' names, their size in bytes, and the file's SHA-256."""

    tensors: tuple[str, ...]
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """The additions of one commit.

    Attributes:
        shards: weight files, in the order of their numbers.
        layers: the 4-bit layers in them.
        notes: notes that the run stores.
        hardly_seen: those of the layers with features that calibration hardly saw.
    """

    shards: tuple[Shard, ...] = ()
    layers: Mapping[str, LayerEntry] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hardly_seen: Mapping[str, HardlySeen] = field(default_factory=dict)


class Journal:
    """The commits of one unfinished component.

    Attributes:
        shard_folder: the folder of its weight files, which are named by number.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.shard_folder = folder / "shards"

    @property
    def num_commits(self) -> int:
        """Return the number of commits, unchecked."""
        return next(number for number in itertools.count() if not self._file(number).is_file())

    def open(self) -> list[Commit]:
        """Return every commit so far, checked against the files; unfinished writes are removed.

        Raises OutputError if a commit or one of its files is damaged.
        """
        self.shard_folder.mkdir(parents=True, exist_ok=True)
        self._restore_numbers()
        commits = [_read(self._file(number)) for number in range(self.num_commits)]
        shards = [shard for commit in commits for shard in commit.shards]
        for number, shard in enumerate(shards):
            path = self.shard_folder / shard_name(number)
            if not path.is_file() or files.sha256_of(path) != shard.sha256:
                raise OutputError(
                    f"{path} is not what was committed: remove {self._folder}, and this denoiser starts over."
                )
        kept = {shard_name(number) for number in range(len(shards))}
        for entry in self.shard_folder.iterdir():
            if entry.name not in kept:
                entry.unlink()
        noted = {self._file(number).name for number in range(len(commits))}
        for entry in self._folder.glob("*.json"):
            if entry.name not in noted:  # after a gap: commits of work that was being removed
                entry.unlink()
        return commits

    def add(self, number: int, commit: Commit) -> None:
        """Record a commit. Its shards are already on disk."""
        record = {
            "shards": [
                {"tensors": list(shard.tensors), "num_bytes": shard.num_bytes, "sha256": shard.sha256}
                for shard in commit.shards
            ],
            "layers": {name: entry.to_dict() for name, entry in commit.layers.items()},
            "notes": list(commit.notes),
            "hardly_seen": hardly_seen_to_dict(commit.hardly_seen),
        }
        partial = self._folder / "commit.partial"
        partial.write_text(json.dumps(record), encoding="utf-8")
        sync(partial)
        partial.replace(self._file(number))
        sync(self._folder)

    def remove(self) -> None:
        """Remove the journal, since the component is in its place."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:04d}.json"

    def _restore_numbers(self) -> None:
        """Restore the numbered names of shards, in case the process was killed while it gave them
        final ones.
        """
        for path in sorted(self.shard_folder.glob(f"{files.WEIGHTS_STEM}*.safetensors")):
            _, _, rest = path.name.partition(f"{files.WEIGHTS_STEM}-")
            number = int(rest.split("-")[0]) - 1 if rest else 0
            path.replace(self.shard_folder / shard_name(number))


def shard_name(number: int) -> str:
    """Return the name of a weight file while the total number is unknown."""
    return f"{number}.safetensors"


def _read(file: Path) -> Commit:
    try:
        record: dict[str, Any] = files.read_json(file)
        shards = tuple(Shard(tuple(s["tensors"]), s["num_bytes"], s["sha256"]) for s in record["shards"])
        layers = {name: LayerEntry.from_dict(entry) for name, entry in record["layers"].items()}
        return Commit(shards, layers, tuple(record["notes"]), hardly_seen_from_dict(record["hardly_seen"]))
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{file} is damaged, or of another version of TempoQuant ({str(error).removesuffix(REMEDY).strip()}): "
            f"remove {file.parent}, and this denoiser starts over."
        ) from error
