"""A pipeline with separate files for its denoisers' weights, as in ComfyUI's and the original
releases.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tempoquant.errors import ModelError
from tempoquant.models.no_source import refuse_file
from tempoquant.models.weight_files import STEMS, WeightFiles

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WithExperts:
    """A pipeline with weights from other files.

    Attributes:
        base: a bundled model's name, a diffusers folder, or a hub id: it gives configs, text
            encoder, autoencoder, scheduler, and the denoisers that `denoisers` does not name.
        denoisers: a denoiser's name to a safetensors file, or to a folder of its shards.
    """

    base: str | Path
    denoisers: Mapping[str, str | Path]

    def __str__(self) -> str:
        return str(self.base)

    def files(self) -> dict[str, tuple[Path, ...]]:
        """Return each denoiser's files. Raises ModelError for an empty folder, and for a file that
        two share.
        """
        found = {name: _files_at(Path(path)) for name, path in self.denoisers.items()}
        for name, files in found.items():
            twice = next((other for other in found if other != name and {*found[other]} & {*files}), None)
            if twice is not None:
                raise ModelError(f"{files[0]} is given as {name} and as {twice}: each has weights of its own.")
        return found


@dataclass(frozen=True)
class GenericModel:
    """A pipeline for the generic family, whatever family its class has.

    Attributes:
        model: a folder, or a hub id.
    """

    model: str | Path

    def __str__(self) -> str:
        return str(self.model)


def warn_of_names(given: Mapping[str, tuple[Path, ...]], denoisers: Iterable[str]) -> None:
    """Log which files are given as one denoiser and have another's name: swapped experts turn every
    video into noise.
    """
    for name, files in given.items():
        for other in {*denoisers} - {name}:
            named = [file for file in files if other in _plain(file) and name not in _plain(file)]
            if named:
                _logger.warning("%s is given as %s, and its name says %s: is that right?", named[0], name, other)


def _plain(file: Path) -> str:
    return f"{file.parent.name}/{file.name}".lower().replace("-", "_")


ModelName: TypeAlias = str | Path | WithExperts | GenericModel
"""The ways to name a model: a bundled model's name, a folder, a hub id, or a base and files."""


def _files_at(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        return tuple(_own(file) for file in _shards_in(path))
    if not path.exists():
        raise ModelError(f"there is no file or folder {path} to read a denoiser from.")
    refuse_file(path)
    return (_own(path),)


def _shards_in(folder: Path) -> tuple[Path, ...]:
    """Return the files of the only model in a folder."""
    known = WeightFiles(folder, STEMS["diffusers"]).files()
    if known:
        return known
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    for other in () if files else sorted(file for file in folder.iterdir() if file.is_file()):
        refuse_file(other)
    if not files:
        raise ModelError(f"{folder} holds no safetensors file: give the file or the folder of a denoiser's weights.")
    if len(files) > 1 and not all("-of-" in file.name for file in files):
        raise ModelError(f"{folder} holds {len(files)} models ({files[0].name}, {files[1].name}, …): give a file.")
    return tuple(files)


def _own(file: Path) -> Path:
    """Return its absolute path; for a link the target, unless that is a blob of the hub's cache."""
    target = file.resolve()
    return target if target.suffix == file.suffix else file.absolute()
