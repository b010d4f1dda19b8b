"""Assembly of a publication: checked files, a complete card, pages of an evaluation."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tempoquant.checkpoint.files import sha256_of
from tempoquant.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from tempoquant.errors import CheckpointError, HubError
from tempoquant.evaluate.pictures import columns_of
from tempoquant.evaluate.side_by_side import write_contact_sheet
from tempoquant.hosts.contents import contents_of
from tempoquant.hosts.diffusers.pipeline import open_pipeline
from tempoquant.hosts.verification import verify_folder
from tempoquant.models.fingerprint import fingerprint
from tempoquant.models.hub import is_hub_id, split_revision
from tempoquant.progress import Progress
from tempoquant.publishing.card import CARD, REPORT, SHEET, Stated, published_card, read_card
from tempoquant.publishing.measured import Measured, measured_of
from tempoquant.report.build import build_report

NUM_PICTURED = 6
"""Items on the contact sheet; the report has all."""


@dataclass(frozen=True)
class PublishedFile:
    """One file of the published model.

    Attributes:
        name: in the repository, with forward slashes.
        content: the file on disk, or the bytes themselves.
        sha256: hexadecimal, of the content.
    """

    name: str
    content: Path | bytes
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Return its size."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def git_hash(self) -> str:
        """Return the hash by which git, and so the hub, names a file that is not large."""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Publication:
    """Everything that goes to the hub.

    Attributes:
        repo: hub id.
        title: what the model is, in a few words.
        card: text of the README.md.
        files: in the order of their names.
        left_out: files in the folder that its manifest does not list, which stay here.
    """

    repo: str
    title: str
    card: str
    files: tuple[PublishedFile, ...]
    left_out: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Return the size of all files."""
        return sum(file.num_bytes for file in self.files)


def prepare(
    folder: Path, repo: str, stated: Stated, evaluation: Path | None, work: Path, progress: Progress
) -> Publication:
    """Check a quantized pipeline and put together what is published of it, without the network.

    Every file is compared with its SHA-256, and every tensor of the denoisers with its config. The
    README.md may have been edited.

    Args:
        folder: what `tempoquant quantize` wrote.
        repo: hub id to publish under.
        stated: licence and base model, where the publisher says them.
        evaluation: what `tempoquant evaluate` or `tempoquant demo` wrote; None for no figures.
        work: a folder for the pages that are made of it.

    Raises:
        HubError: the name is no hub id, the folder is an export, or nobody says the licence.
        CheckpointError: the folder is incomplete, altered, or no TempoQuant result.
        EvaluationError: the evaluation is not of this model.
    """
    _require_name(repo)
    manifest = _require_quantized(folder)
    read_card(folder / CARD)  # a mistake in it is named before every file is read
    verify_folder(folder, progress, but=(CARD,))
    source = open_pipeline(folder)
    measured = None
    if evaluation is not None:
        measured = measured_of(evaluation, fingerprint(source, progress), str(folder))
    pages = {} if measured is None else _pages(measured, work, progress)
    card = published_card(folder, repo, source, stated, measured, list(pages))
    listed = {name: PublishedFile(name, folder / name, digest) for name, digest in manifest.sha256.items()}
    listed |= {name: PublishedFile(name, file, sha256_of(file)) for name, file in pages.items()}
    listed[CARD] = _of_text(CARD, card)
    listed[MANIFEST_NAME] = _manifest_with(manifest, listed[CARD])
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    title = f"{source.family.title(source.index)}, {contents_of(folder).bits_per_weight:.2f} bits per weight"
    files = tuple(listed[name] for name in sorted(listed))
    return Publication(repo, title, card, files, tuple(sorted(present - set(listed))))


def _require_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not is_hub_id(repo) or split_revision(repo)[1] is not None:
        raise HubError(f"{repo!r} is not ORG/NAME: give your name on the hub or an organization's, and the model's.")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"the hub takes no name {repo!r}: {error}") from error


def _require_quantized(folder: Path) -> Manifest:
    """Return the manifest of a folder that `quantize` wrote.

    Raises HubError for an export, CheckpointError for anything else.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give what `tempoquant quantize` wrote.")
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST_NAME}, so it is nothing that `tempoquant quantize` finished: publish the "
            "folder that it wrote."
        )
    manifest = read_manifest(folder)
    if "export_target" in manifest.run:
        raise HubError(
            f"{folder} is an export to {manifest.run['export_target']}: publish the folder that it was exported from, "
            f"which everyone can export again, or upload this one as it is with `hf upload ORG/NAME {folder}`."
        )
    if CARD not in manifest.sha256:
        raise CheckpointError(f"{folder / MANIFEST_NAME} lists no {CARD}: quantize the model again.")
    return manifest


def _manifest_with(manifest: Manifest, card: PublishedFile) -> PublishedFile:
    """Return the manifest with the hash of the new card, written as `write_manifest` writes it."""
    changed = dataclasses.replace(manifest, sha256={**manifest.sha256, card.name: card.sha256})
    record = {"run": changed.run, "sha256": changed.sha256}
    return _of_text(MANIFEST_NAME, json.dumps(record, indent=1, sort_keys=True) + "\n")


def _of_text(name: str, text: str) -> PublishedFile:
    content = text.encode("utf-8")
    return PublishedFile(name, content, hashlib.sha256(content).hexdigest())


def _pages(measured: Measured, work: Path, progress: Progress) -> Mapping[str, Path]:
    """Make an evaluation's contact sheet and report, and return the files by their names."""
    build_report([measured.evaluation.folder], work / REPORT, progress=progress)
    items = [item for item in measured.document["items"] if not item["failed"]][:NUM_PICTURED]
    if items:
        columns = columns_of(measured.document, items, measured.evaluation.folder)
        write_contact_sheet(work / SHEET, columns, [item["prompt"] for item in items])
    return {file.relative_to(work).as_posix(): file for file in sorted(work.rglob("*")) if file.is_file()}
