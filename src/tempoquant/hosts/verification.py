"""Checks a quantized pipeline folder: what its configs and headers say, then every byte."""

from collections.abc import Collection
from pathlib import Path

from tempoquant.checkpoint import verify_hashes
from tempoquant.checkpoint.manifest import MANIFEST_NAME, missing_files, read_manifest, verify_manifest
from tempoquant.errors import CheckpointError
from tempoquant.hosts.contents import check_component, check_headers, config_of, quantized_components
from tempoquant.hosts.diffusers.pipeline import open_pipeline
from tempoquant.models.pipeline_folder import index_file
from tempoquant.models.sampling_file import default_settings
from tempoquant.progress import Progress


def check_sound(folder: Path) -> None:
    """Check manifest, configs, indexes and headers of a quantized pipeline.

    In a folder without a pipeline's index, the denoisers alone are checked. Raises CheckpointError
    or ModelError for the first damage.
    """
    if (folder / MANIFEST_NAME).is_file() and (missing := missing_files(folder, read_manifest(folder))):
        raise CheckpointError(f"{folder / missing[0]} is missing: fetch the folder again.")
    if index_file(folder) is not None:
        default_settings(open_pipeline(folder))
        return
    for component in quantized_components(folder).values():
        check_headers(component)


def verify_folder(folder: Path, progress: Progress, but: Collection[str] = ()) -> list[str]:
    """Check the hash of every file, and every tensor of all denoisers; return the files that agree.

    A folder put together by hand has no manifest. Then only the denoisers' weight files are
    checked.

    Args:
        but: names of files that may differ from what the manifest says.

    Raises:
        CheckpointError: the first damage, or ModelError.
    """
    check_sound(folder)
    components = quantized_components(folder)
    advance = progress.start("Verifying", len(components) + 1)
    verified = set(verify_manifest(folder, but)) if (folder / MANIFEST_NAME).is_file() else set()
    advance()
    for component in components.values():
        verified |= {f"{component.name}/{name}" for name in verify_hashes(component, config_of(component))}
        check_component(component)
        advance()
    return sorted(verified)
