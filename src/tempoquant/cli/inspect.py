"""`tempoquant inspect`: the content of a quantized pipeline."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tempoquant.cli.options import Folder, Json
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress


def command(
    folder: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Check every file's hash and every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show the content of a quantized pipeline.

    That is its layers, formats, bits per weight, sizes, timestep bins, clip ratios, recipe and
    calibration.
    """

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.tables import contents_table, hardly_seen_lines
        from tempoquant.hosts.contents import contents_of
        from tempoquant.plain_values import plain

        contents = contents_of(folder)
        check_sound(folder)
        record: dict[str, Any] = plain(contents)
        notes = [f"{denoiser.denoiser}: {note}" for denoiser in contents.denoisers for note in denoiser.notes]
        shown = {**contents.recipe, "layers": f"{len(contents.recipe['layers'])} rules"}
        settings = ", ".join(f"{key} {value}" for key, value in shown.items() if key != "name")
        lines = [f"Recipe: {settings}", *hardly_seen_lines(contents), *notes]
        if verify:
            record["verified_files"] = verify_folder(folder, progress)
            lines.append(f"Verified: {len(record['verified_files'])} files.")
        return Outcome(record, Group(contents_table(contents), *lines))

    run_command(work, as_json)


def check_sound(folder: Path) -> None:
    """Check manifest, configs, indexes and headers of a quantized pipeline.

    In a folder without a pipeline's index, the denoisers alone are checked. Raises CheckpointError
    or ModelError for the first damage.
    """
    from tempoquant.checkpoint.manifest import MANIFEST_NAME, missing_files, read_manifest
    from tempoquant.errors import CheckpointError
    from tempoquant.hosts.contents import check_headers, quantized_components
    from tempoquant.hosts.diffusers.pipeline import open_pipeline
    from tempoquant.models.pipeline_folder import index_file
    from tempoquant.models.sampling_file import default_settings

    if (folder / MANIFEST_NAME).is_file() and (missing := missing_files(folder, read_manifest(folder))):
        raise CheckpointError(f"{folder / missing[0]} is missing: fetch the folder again.")
    if index_file(folder) is not None:
        default_settings(open_pipeline(folder))
        return
    for component in quantized_components(folder).values():
        check_headers(component)


def verify_folder(folder: Path, progress: Progress) -> list[str]:
    """Check the hash of every file, and every tensor of all denoisers; return the files that agree.

    A folder put together by hand has no manifest: there, only the denoisers' weight files are
    checked. Raises CheckpointError or ModelError for the first damage.
    """
    from tempoquant.checkpoint import verify_hashes
    from tempoquant.checkpoint.manifest import MANIFEST_NAME, verify_manifest
    from tempoquant.hosts.contents import check_component, config_of, quantized_components

    check_sound(folder)
    components = quantized_components(folder)
    advance = progress.start("Verifying", len(components) + 1)
    verified = set(verify_manifest(folder)) if (folder / MANIFEST_NAME).is_file() else set()
    advance()
    for component in components.values():
        verified |= {f"{component.name}/{name}" for name in verify_hashes(component, config_of(component))}
        check_component(component)
        advance()
    return sorted(verified)
