"""`tempoquant report`: evaluations as one HTML page."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tempoquant.cli.options import Json
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress

BUDGET_MIB = 64


def command(
    folders: Annotated[list[Path], typer.Argument(metavar="OUT…", help="Folders that `tempoquant evaluate -o` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page.")] = Path(
        "report.html"
    ),
    embed_mib: Annotated[
        float,
        typer.Option(
            min=0, metavar="MIB", help="Size of the videos inside the page; the rest go to a folder beside it."
        ),
    ] = BUDGET_MIB,
    times: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="What `tempoquant plan MODEL --time --json` printed: shows where time goes.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page about evaluations, which opens from disk.

    It shows quality, size, memory and speed, videos side by side, heat maps, and recipes.
    Evaluations of the same 16-bit videos are merged; others follow each other on the page.
    """

    def work(progress: Progress) -> Outcome:
        from tempoquant.report.build import build_report

        record = build_report(folders, output, embed_mib, progress, times)
        return Outcome(record, describe(record))

    run_command(work, as_json)


def describe(record: dict[str, Any]) -> str:
    """Describe where the page is, and the files that belong to it."""
    from tempoquant.cli.tables import format_bytes

    lines = [
        f"{record['page']}: {record['num_items']} items, {format_bytes(record['num_bytes'])}; open it in a browser."
    ]
    if record["folder_beside"]:
        lines.append(
            f"{record['num_videos_beside']} videos are beside it in {record['folder_beside']}: keep them together "
            "(--embed-mib puts more inside)."
        )
    return "\n".join(lines)
