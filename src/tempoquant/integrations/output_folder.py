"""The folder a quantized pipeline is written to: complete or absent, and recognised when the same run comes again."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tempoquant.checkpoint.files import sha256_of
from tempoquant.checkpoint.manifest import MANIFEST_NAME, missing_files, read_manifest, write_manifest
from tempoquant.errors import CheckpointError, OutputError
from tempoquant.integrations.model_card import model_card
from tempoquant.integrations.pipeline_folder import components_of

_EXPERTS = ("transformer", "transformer_2")
_ROOT_FILES = ("model_index.json", "sampling.json")


@dataclass(frozen=True)
class RunIdentity:
    """What makes two runs the same run.

    Attributes:
        recipe: the resolved recipe.
        source: fingerprint of the 16-bit model.
        prompts: provenance of the calibration prompts.
        seed: of the calibration's noise.
        library_version: of the TempoQuant that ran.
    """

    recipe: dict[str, Any]
    source: str
    prompts: list[dict[str, str]]
    seed: int
    library_version: str


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of the files of a pipeline's components."""
    digest = hashlib.sha256()
    for name in sorted(components_of(folder)):
        for file in sorted(file for file in (folder / name).rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(folder).as_posix()}:{sha256_of(file)}\n".encode())
    return digest.hexdigest()


class OutputFolder:
    """Where a run writes.

    Args:
        path: does not exist, is empty, or holds an earlier result.
        identity: of this run.
    """

    def __init__(self, path: Path, identity: RunIdentity) -> None:
        self.path = path.expanduser().resolve()  # "." and links cannot be renamed to
        self._identity = asdict(identity)

    def refuse_source(self, source: Path) -> None:
        """Raise OutputError when writing here would destroy the model that is read, or put the result inside it."""
        source = source.resolve()
        if self.path == source or source.is_relative_to(self.path) or self.path.is_relative_to(source):
            raise OutputError(f"{self.path} and the model in {source} overlap: choose a folder beside it.")

    def is_finished(self, overwrite: bool) -> bool:
        """Whether the folder already holds this very run's result.

        Raises:
            OutputError: it holds something else and `overwrite` was not asked for; the difference is named.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file: give a folder.")
        if overwrite or not self.path.exists() or not any(self.path.iterdir()):
            return False
        if not (self.path / MANIFEST_NAME).is_file():
            raise OutputError(
                f"{self.path} is not empty and holds no TempoQuant result: choose another folder, or --overwrite."
            )
        try:
            manifest = read_manifest(self.path)
        except CheckpointError as error:
            raise OutputError(f"{error} Or choose another folder, or --overwrite.") from error
        if missing := missing_files(self.path, manifest):
            raise OutputError(f"{self.path / missing[0]} is missing: choose another folder, or --overwrite.")
        different = [key for key, value in self._identity.items() if manifest.run.get(key) != value]
        if different:
            raise OutputError(
                f"{self.path} holds another run's result (different {' and '.join(different)}): "
                "choose another folder, or --overwrite."
            )
        return True

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A temporary folder beside the output; removed when anything fails, Ctrl-C included.

        Raises:
            OutputError: the parent cannot be written, or the disk is full.
        """
        partial = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent))
            yield partial
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error.strerror or error}.") from error
        except OutputError as error:  # from a component's writer, which knows only the temporary folder
            raise OutputError(str(error).replace(str(partial), str(self.path))) from error
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

    def complete(self, partial: Path, source: Path, link: bool, hub_id: str | None = None) -> None:
        """Add all that was not quantized, the model card and the manifest; then let the folder appear in one rename."""
        for name in components_of(source):
            if name not in _EXPERTS:
                shutil.copytree(source / name, partial / name, copy_function=_link if link else _copy)
        for name in _ROOT_FILES:
            if (source / name).is_file():
                _copy(source / name, partial / name)
        (partial / "README.md").write_text(
            model_card(partial, source, self._identity["recipe"], hub_id), encoding="utf-8"
        )
        write_manifest(partial, self._identity)
        for entry in (partial, *partial.rglob("*")):  # temporary folders are 0700: others could not read the model
            if not link or entry.is_dir() or entry.parent.name in _EXPERTS:
                entry.chmod(0o755 if entry.is_dir() else 0o644)
        self._replace_by(partial)

    def _replace_by(self, partial: Path) -> None:
        """Rename; what was there before comes back if that fails, Ctrl-C included, and goes only afterwards."""
        old = partial.with_suffix(".old")
        if self.path.exists():
            self.path.rename(old)
        try:
            partial.rename(self.path)
        except BaseException:
            if old.exists():
                old.rename(self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _link(source: str | Path, target: str | Path) -> None:
    os.link(os.path.realpath(source), target)  # of the file itself: the hub's cache holds relative symbolic links


def _copy(source: str | Path, target: str | Path) -> None:
    """Content only: times and owners would make equal runs differ. Links are followed (the hub's cache has them)."""
    shutil.copyfile(source, target)
