"""The command line: one file per command. Everything heavy is imported inside the commands, so that --help is quick."""

from typing import Annotated

import typer

from tempoquant.cli import compare, demo, generate, inspect, quantize

app = typer.Typer(
    name="tempoquant",
    help="Timestep-aware 4-bit weights and activations (W4A4) for Wan2.2 image-to-video, on plain diffusers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.command)
app.command("quantize")(quantize.command)
app.command("generate")(generate.command)
app.command("inspect")(inspect.command)
app.command("compare")(compare.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tempoquant {version('tempoquant')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Timestep-aware 4-bit weights and activations (W4A4) for Wan2.2 image-to-video, on plain diffusers."""


__all__ = ["app"]
