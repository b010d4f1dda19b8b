"""`tempoquant inspect`: the content of a quantized pipeline."""

from typing import Annotated, Any

import typer

from tempoquant.cli.options import Folder, Json
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress


def command(
    model: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Check every file's hash and every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show the content of a quantized pipeline.

    That is its layers, formats, bits per weight, sizes, timestep bins, clip ratios, recipe and
    calibration.
    """

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.tables import contents_table, hardly_seen_lines, text_encoder_lines
        from tempoquant.hosts.contents import contents_of
        from tempoquant.hosts.verification import check_sound, verify_folder
        from tempoquant.models.hub import fetch
        from tempoquant.models.pipeline_folder import WHOLE_MODEL, hub_name, local_folder
        from tempoquant.plain_values import plain

        folder = local_folder(model) or fetch(hub_name(model), WHOLE_MODEL)
        contents = contents_of(folder)
        check_sound(folder)
        record: dict[str, Any] = plain(contents)
        notes = [f"{denoiser.denoiser}: {note}" for denoiser in contents.denoisers for note in denoiser.notes]
        shown = {**contents.recipe, "layers": f"{len(contents.recipe['layers'])} rules"}
        settings = ", ".join(f"{key} {value}" for key, value in shown.items() if key != "name")
        lines = [f"Recipe: {settings}", *text_encoder_lines(contents), *hardly_seen_lines(contents), *notes]
        if verify:
            record["verified_files"] = verify_folder(folder, progress)
            lines.append(f"Verified: {len(record['verified_files'])} files.")
        return Outcome(record, Group(contents_table(contents), *lines))

    run_command(work, as_json)
