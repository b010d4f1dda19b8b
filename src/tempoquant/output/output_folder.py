"""The folder that a quantized pipeline is written to: complete or absent, and recognized by a
repeated run.

Until it is complete, everything is in a work folder beside it (`work_folder.py`), which the same
run continues.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tempoquant.checkpoint.files import sync, sync_tree
from tempoquant.checkpoint.manifest import MANIFEST_NAME, missing_files, read_manifest, write_manifest
from tempoquant.errors import CheckpointError, OutputError
from tempoquant.models.pipeline_folder import INDEX_NAMES
from tempoquant.models.sampling_file import SAMPLING_FILE, stated_sampling
from tempoquant.models.source import SourceModel
from tempoquant.models.weight_files import make_plain
from tempoquant.output.work_folder import WorkFolder, write_atomically
from tempoquant.progress import SILENT, Progress

_ROOT_FILES = (*INDEX_NAMES, SAMPLING_FILE)
_RESULT = "result"


@dataclass(frozen=True)
class RunIdentity:
    """The facts that make two runs the same run.

    Attributes:
        recipe: the resolved recipe.
        source: fingerprint of the 16-bit model.
        prompts: provenance of the calibration prompts.
        store: digest of the given sample store, or None if the run records its own.
        seed: of the calibration's noise.
        compute_dtype: of samples and hidden states: a run that began on a CPU does not resume on a
            GPU.
        lora: denoiser to the SHA-256 of the LoRA fused into it.
        library_version: of the TempoQuant that ran.
        budget: that decided the ranks, and the SHA-256 of the given sensitivity file; None for no
            budget.
    """

    recipe: dict[str, Any]
    source: str
    prompts: list[dict[str, str]]
    store: str | None
    seed: int
    compute_dtype: str = "float32"
    lora: dict[str, str] = field(default_factory=dict)
    library_version: str = ""
    budget: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExportIdentity:
    """The facts that make two exports the same export.

    Attributes:
        export_target: such as "nunchaku-lite".
        source: fingerprint of the quantized pipeline.
        library_version: of the TempoQuant that ran.
        clip_ratios_carried: whether the target has the source's clip ratios.
    """

    export_target: str
    source: str
    library_version: str
    clip_ratios_carried: bool = False


class OutputFolder:
    """The folder of a run's result.

    Args:
        path: does not exist, is empty, or holds an earlier result.
        identity: of this run.
        overwrite: whether any other content is replaced.
    """

    def __init__(self, path: Path, identity: RunIdentity | ExportIdentity, overwrite: bool = False) -> None:
        self._overwrite = overwrite
        self.path = path.expanduser().resolve()  # "." and links cannot be renamed to
        self._identity = asdict(identity)

    def refuse_overlap(self, read: Path) -> None:
        """Raise OutputError if writing here would destroy a folder that is read, or put the result
        inside it.
        """
        read = read.resolve()
        for place in (self.path, self.work.path):
            if place == read or read.is_relative_to(place) or place.is_relative_to(read):
                raise OutputError(f"{place} and {read}, which is read, overlap: choose an output beside it.")

    def check_link(self, source: SourceModel) -> None:
        """Raise OutputError if files of the source cannot be hard-linked from here, since they are
        on another disk.
        """
        place = next(parent for parent in self.path.parents if parent.exists())
        for name in source.components:
            for file in (source.folder / name).rglob("*"):
                if file.is_file() and file.resolve().stat().st_dev != place.stat().st_dev:
                    raise OutputError(f"{self.path} is on another disk than {file}: repeat without --link.")

    def is_finished(self) -> bool:
        """Return whether the folder already holds this run's result.

        Raises:
            OutputError: it holds something else, and overwriting was not asked for; the difference
                is named.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file: give a folder.")
        if self._overwrite or not self.path.exists() or not any(self.path.iterdir()):
            return False
        if not (self.path / MANIFEST_NAME).is_file():
            raise OutputError(
                f"{self.path} is not empty and holds no TempoQuant result: choose another folder, or --overwrite."
            )
        try:
            manifest = read_manifest(self.path)
        except CheckpointError as error:
            raise OutputError(f"{error} Choose another folder, or --overwrite.") from error
        if missing := missing_files(self.path, manifest):
            raise OutputError(f"{self.path / missing[0]} is missing: choose another folder, or --overwrite.")
        different = [key for key, value in self._identity.items() if manifest.run.get(key) != value]
        if different:
            raise OutputError(
                f"{self.path} holds another run's result (different {' and '.join(different)}): "
                "choose another folder, or --overwrite."
            )
        return True

    @property
    def work(self) -> WorkFolder:
        """Return the folder in which this run works until the result is complete. Raises
        OutputError for a place that nothing can be moved to.
        """
        if os.path.ismount(self.path):
            raise OutputError(f"{self.path} is a mount point, which cannot be replaced: choose a folder inside it.")
        return WorkFolder(self.path, self._identity)

    def component(self, work: Path, name: str) -> Path:
        """Return the place of a component of the result while the run works."""
        return work / _RESULT / name

    def complete(
        self,
        work: Path,
        source: SourceModel,
        link: bool,
        card: Callable[[Path], str],
        sampling: Mapping[str, Any] | None = None,
        progress: Progress = SILENT,
    ) -> None:
        """Add all unquantized components, the model card and the manifest; then let the folder
        appear in one rename.

        Args:
            work: the work folder, with all denoisers' components in their place.
            link: hard-link the unquantized components, instead of copying them.
            card: returns the text of the model card, from the result without one.
            sampling: the result's sampling settings, or None for the source's own.
        """
        result = work / _RESULT
        try:
            others = source.other_components
            advance = progress.start("Adding the other components", len(others) + 1)
            for name in others:
                if not (result / name).is_dir():
                    partial = work / f"{name}.partial"
                    shutil.rmtree(partial, ignore_errors=True)
                    shutil.copytree(source.folder / name, partial, copy_function=_link if link else _copy)
                    make_plain(partial, source.components[name].library)
                    sync_tree(partial)
                    partial.rename(result / name)
                advance()
            for name in _ROOT_FILES:
                if (source.folder / name).is_file():
                    _copy(source.folder / name, result / name)
            stated = stated_sampling(source)  # in the denoisers' configs, after diffusers saved the source
            if sampling is None and stated is not None and not (result / SAMPLING_FILE).is_file():
                sampling = stated[1]
            if sampling is not None:
                write_atomically(result / SAMPLING_FILE, json.dumps(dict(sampling), indent=1) + "\n")
            (result / "README.md").write_text(card(result), encoding="utf-8")
            self._appear(result, lambda path: path.stat().st_nlink == 1)  # and no link to a file of the source
            advance()
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error.strerror or error}.") from error

    def complete_alone(self, work: Path, card: str) -> None:
        """Let a result without a pipeline, all of whose files this run wrote, appear with its card
        and manifest.

        Args:
            work: the work folder; `component` gives the places of the result's files.
            card: text of its README.md.
        """
        result = work / _RESULT
        try:
            (result / "README.md").write_text(card, encoding="utf-8")
            self._appear(result, lambda path: True)
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error.strerror or error}.") from error

    def _appear(self, result: Path, is_ours: Callable[[Path], bool]) -> None:
        """Write the manifest, set permissions, flush everything to disk, and rename."""
        write_manifest(result, self._identity)
        for entry in (result, *result.rglob("*")):  # a strict umask would keep others from reading the model
            if entry.is_dir() or is_ours(entry):
                entry.chmod(0o755 if entry.is_dir() else 0o644)
        for entry in result.iterdir():
            if entry.is_file():
                sync(entry)
        sync(result)
        self._replace_by(result)
        sync(self.path.parent)

    def _replace_by(self, result: Path) -> None:
        """Rename; if that fails, also by Ctrl-C, the previous content comes back; it is removed
        only afterwards.
        """
        if not self._overwrite and self.path.is_dir() and any(self.path.iterdir()):
            raise OutputError(
                f"something was put into {self.path} meanwhile: move it away; the same command then ends at once."
            )
        old = self.path.with_name(f".{self.path.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # from a run that was killed right here
        if self.path.exists():
            self.path.rename(old)
        try:
            result.rename(self.path)
        except BaseException:
            if old.exists():
                old.rename(self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _link(source: str | Path, target: str | Path) -> None:
    os.link(os.path.realpath(source), target)  # of the file itself: the hub's cache holds relative symbolic links


def _copy(source: str | Path, target: str | Path) -> None:
    """Copy the content only: times and owners would make equal runs differ. Links are followed (the
    hub's cache has them).
    """
    shutil.copyfile(source, target)
