"""`tempoquant export`: a quantized pipeline in another engine's files."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tempoquant.cli.json_log import JsonLogFile
from tempoquant.cli.options import Folder, Json, Overwrite
from tempoquant.cli.running import GOES_ON, Outcome, run_command
from tempoquant.progress import Progress


class Target(str, Enum):
    """Whose files to write."""

    NUNCHAKU_LITE = "nunchaku-lite"


def command(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; new, or empty.")],
    target: Annotated[Target, typer.Option("--to", help="diffusers' own quant_method nunchaku_lite.")],
    overwrite: Overwrite = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link the unquantized components instead of copying them.")
    ] = False,
    json_log: JsonLogFile = None,
    as_json: Json = False,
) -> None:
    """Write all denoisers for stock diffusers, which runs them with nunchaku's fused kernels on NVIDIA GPUs.

    DIR is what `quantize` wrote with --recipe nunchaku_int4 or nunchaku_nvfp4, or like them: layers that the kernels
    cannot hold are refused by name. Clip ratios are not carried. `compare` scores OUT as the kernels round.
    """

    def work(progress: Progress) -> Outcome:
        from rich.console import Group

        from tempoquant.cli.quantize import is_finished
        from tempoquant.cli.tables import contents_table
        from tempoquant.hosts.contents import contents_of
        from tempoquant.hosts.nunchaku.export import export
        from tempoquant.plain_values import plain

        was_there = is_finished(output) and not overwrite
        path = export(folder, output, overwrite=overwrite, link=link, progress=progress)
        contents = contents_of(path)
        record = {"output": str(path), "existed": was_there, "target": target.value, "clip_ratios_carried": False}
        notes = [f"{denoiser.denoiser}: {note}" for denoiser in contents.denoisers for note in denoiser.notes]
        words = f"{path} was already finished." if was_there else f"Written to {path}."
        return Outcome({**record, **plain(contents)}, Group(contents_table(contents), *notes, words))

    run_command(work, as_json, json_log, interrupted=GOES_ON)
