"""`tempoquant publish`: a quantized pipeline becomes a model on the hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempoquant.cli.options import Json
from tempoquant.cli.running import Outcome, run_command
from tempoquant.progress import Progress

if TYPE_CHECKING:
    from tempoquant.publishing.publication import Publication

_INTERRUPTED = "interrupted: files that arrived are not sent again by the same command; nobody sees a part of them."


def command(  # noqa: PLR0913 (one argument per option)
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `tempoquant quantize` wrote.")],
    repo: Annotated[str, typer.Option("--to", metavar="ORG/NAME", help="Name on the hub; created if it is new.")],
    public: Annotated[bool, typer.Option("--public", help="Everyone may see it. Private if left out.")] = False,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="The base model's, such as apache-2.0; its card's if left out.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="The 16-bit model on the hub; its card's if left out.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="What `evaluate` or `demo` wrote: figures, contact sheet and page go along."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what the name holds by one more commit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show card and files, and contact nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload a quantized pipeline to the Hugging Face hub.

    Every file is checked first, and the model card is completed. The model is private unless you
    say --public. Log in first, with `hf auth login` or HF_TOKEN.
    After Ctrl-C or a broken connection the same command sends only what is missing. One commit
    makes all files appear at once. DIR is not changed.
    """

    def work(progress: Progress) -> Outcome:
        from tempoquant.publishing.card import Stated
        from tempoquant.publishing.publication import prepare
        from tempoquant.publishing.repository import Repository

        there = None if dry_run else Repository(repo)  # nobody logged in is said before the work
        with tempfile.TemporaryDirectory(prefix="tempoquant-publish-", ignore_cleanup_errors=True) as pages:
            stated = Stated(license, base_model)
            publication = prepare(folder, repo, stated, report, Path(pages), progress)
            record = _record(publication, public, dry_run)
            if there is None:
                return Outcome(record, _plan_text(publication, public))
            held = there.held()
            if held is None:
                there.create(is_private=not public)
            else:
                _require_fit(publication, held, public, overwrite)
            commit = there.upload(publication, held, progress)
            words = f"{_summary(publication, public)}\n{there.url}"
        return Outcome({**record, "url": there.url, "commit": commit}, words)

    run_command(work, as_json, interrupted=_INTERRUPTED)


def _require_fit(publication: "Publication", held: Any, public: bool, overwrite: bool) -> None:
    """Raise HubError where the name holds something else, or other people see it than was asked."""
    from tempoquant.publishing.repository import require_same, require_visibility

    if overwrite:
        require_visibility(held, publication.repo, not public)
    else:
        require_same(publication, held, publication.repo, not public)


def _record(publication: "Publication", public: bool, dry_run: bool) -> dict[str, Any]:
    return {
        "repo": publication.repo,
        "visibility": "public" if public else "private",
        "dry_run": dry_run,
        "num_bytes": publication.num_bytes,
        "files": [{"name": file.name, "num_bytes": file.num_bytes} for file in publication.files],
        "left_out": list(publication.left_out),
        "card": publication.card,
    }


def _summary(publication: "Publication", public: bool) -> str:
    """Summarize such as "someone/model, private: 61 files, 21.3 GiB"; and the files that stay
    here.
    """
    from tempoquant.cli.tables import format_bytes

    seen = "public" if public else "private"
    size = format_bytes(publication.num_bytes)
    lines = [f"{publication.repo}, {seen}: {publication.title}; {len(publication.files)} files, {size}."]
    if publication.left_out:
        count, first = len(publication.left_out), publication.left_out[0]
        lines.append(f"{count} files that tempoquant.json does not list stay here, such as {first}.")
    return "\n".join(lines)


def _plan_text(publication: "Publication", public: bool) -> Any:
    """Describe a dry run: the card as it would be published, the files, the name."""
    from rich.console import Group
    from rich.table import Table

    from tempoquant.cli.tables import format_bytes

    table = Table(title="Files", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    for file in publication.files:
        table.add_row(file.name, format_bytes(file.num_bytes))
    return Group(publication.card, table, _summary(publication, public), "Nothing was sent (--dry-run).")
