"""The frame of every command: progress to stderr, the result to stdout, errors as sentences."""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType

from tempoquant.cli.json_log import JsonLog
from tempoquant.cli.progress import RichProgress
from tempoquant.errors import TempoQuantError
from tempoquant.progress import Progress

FAILED = 1
INTERRUPTED = 130
"""The exit code of shells for an interrupt: 128 + SIGINT."""

GOES_ON = "interrupted: finished work is kept, and the same command resumes it."
NOTHING_KEPT = "interrupted: unfinished output is removed, and earlier files are untouched."

WIDTH_OF_FILES = 160
"""Characters of a line if stdout is no terminal."""


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        record: plain values that --json prints.
        text: the text for people, without --json.
        code: the exit code of the command, after it printed.
    """

    record: dict[str, Any]
    text: RenderableType
    code: int = 0


def run_command(
    work: Callable[[Progress], Outcome],
    as_json: bool = False,
    json_log: Path | None = None,
    interrupted: str = NOTHING_KEPT,
) -> None:
    """Do the work of one command and print its outcome: to stdout, either one JSON object or text.

    Args:
        as_json: print JSON.
        json_log: file that progress is appended to, a JSON object a line.
        interrupted: the message after Ctrl-C.

    Everything else goes to stderr. Errors that TempoQuant raises on purpose and errors of the file
    system become one sentence and exit code 1 (with --json also an object {"error": …} on stdout);
    Ctrl-C becomes exit code 130. Any other exception is a bug and keeps its traceback.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from tempoquant.hosts.diffusers.quiet import quiet_libraries

            quiet_libraries()
            with contextlib.ExitStack() as stack:
                progress: Progress = stack.enter_context(RichProgress())
                if json_log is not None:
                    progress = stack.enter_context(JsonLog(progress, json_log))
                outcome = work(progress)
    except KeyboardInterrupt:
        _fail(interrupted, INTERRUPTED, as_json)
    except TempoQuantError as error:
        _fail(str(error), FAILED, as_json)
    except BrokenPipeError:  # the reader of our output has gone: typer ends quietly
        raise
    except OSError as error:
        _fail(_sentence(error), FAILED, as_json)
    except MemoryError:
        _fail("this machine ran out of memory.", FAILED, as_json)
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            _fail("this machine ran out of memory.", FAILED, as_json)
        if type(error).__name__ != "OutOfMemoryError":  # torch's error; torch is not imported here
            raise
        _fail(
            "the GPU ran out of memory: free some, choose another GPU with --device, or process less at once "
            "(--tokens-at-once, --memory lean, smaller --size or fewer --frames).",
            FAILED,
            as_json,
        )
    else:
        if as_json:
            from tempoquant.plain_values import to_json

            typer.echo(to_json(outcome.record))
        else:
            _stdout().print(outcome.text)
        if outcome.code:
            raise typer.Exit(outcome.code)


def _stdout() -> Console:
    """Make a console that prints names and prompts unchanged, and keeps tables' columns if no
    terminal gives a width.
    """
    width = None if sys.stdout.isatty() else WIDTH_OF_FILES
    return Console(width=width, markup=False, highlight=False, emoji=False)


def _sentence(error: OSError) -> str:
    """Write an error as a sentence, such as "No space left on device: out/model.safetensors."."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}: {error.filename}." if error.filename else f"{reason.rstrip('.')}."


def _fail(sentence: str, code: int, as_json: bool) -> None:
    Console(stderr=True, soft_wrap=True).print(f"error: {sentence}", style="red", markup=False, highlight=False)
    if as_json:
        typer.echo(json.dumps({"error": sentence}, ensure_ascii=False))
    raise typer.Exit(code)
