"""The command line: one file per command. Heavy modules are imported inside the commands, so that
--help is quick.
"""

from typing import Annotated

import typer

from tempoquant.cli.compare import command as compare_command
from tempoquant.cli.demo import command as demo_command
from tempoquant.cli.doctor import command as doctor_command
from tempoquant.cli.evaluate import command as evaluate_command
from tempoquant.cli.export import command as export_command
from tempoquant.cli.generate import command as generate_command
from tempoquant.cli.inspect import command as inspect_command
from tempoquant.cli.plan import command as plan_command
from tempoquant.cli.publish import command as publish_command
from tempoquant.cli.quantize import command as quantize_command
from tempoquant.cli.record import command as record_command
from tempoquant.cli.report import command as report_command
from tempoquant.cli.sensitivity import command as sensitivity_command

app = typer.Typer(
    name="tempoquant",
    help="Quantize video diffusion transformers to 4-bit weights and activations (W4A4), on plain diffusers.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # a paragraph is filled to the terminal's width
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo_command)
app.command("plan")(plan_command)
app.command("record")(record_command)
app.command("quantize")(quantize_command)
app.command("sensitivity")(sensitivity_command)
app.command("generate")(generate_command)
app.command("inspect")(inspect_command)
app.command("compare")(compare_command)
app.command("evaluate")(evaluate_command)
app.command("report")(report_command)
app.command("doctor")(doctor_command)
app.command("export")(export_command)
app.command("publish")(publish_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tempoquant {version('tempoquant')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize video diffusion transformers to 4-bit weights and activations (W4A4), on plain
    diffusers.
    """


__all__ = ["app"]
