"""`tempoquant inspect`: what is inside a quantized pipeline."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tempoquant.cli.options import Folder, Json
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress


def command(
    folder: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Check every weight file's hash and every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show layers, formats, bits per weight, sizes, timestep bins, clip ratios, recipe and calibration."""

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.tables import contents_table
        from tempoquant.evaluate.contents import contents_of
        from tempoquant.evaluate.results import plain

        contents = contents_of(folder)
        record: dict[str, Any] = plain(contents)
        notes = [f"{expert.expert.value}: {note}" for expert in contents.experts for note in expert.notes]
        settings = ", ".join(f"{key} {value}" for key, value in contents.recipe.items() if key != "name")
        lines = [f"Recipe: {settings}", *notes]
        if verify:
            record["verified_files"] = verify_components(folder, progress)
            lines.append(f"Verified: {', '.join(record['verified_files'])}.")
        return Outcome(record, Group(contents_table(contents), *lines))

    run_command(work, as_json)


def verify_components(folder: Path, progress: Progress) -> list[str]:
    """Check hashes and tensors of both experts; the files that agree. Raises CheckpointError for the first damage."""
    from tempoquant.checkpoint import check_tensors, verify_hashes
    from tempoquant.evaluate.contents import quantized_components

    components = quantized_components(folder)
    on_component = progress.start("verifying", len(components))
    verified = []
    for component in components.values():
        verified += [f"{component.name}/{name}" for name in verify_hashes(component)]
        check_tensors(component)
        on_component()
    return verified
