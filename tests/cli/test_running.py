import errno
import json
import math
import sys

import pytest
import typer

from tempoquant.cli.running import FAILED, INTERRUPTED, Outcome, run_command
from tempoquant.errors import CheckpointError, RecipeError


def chatty(progress):
    """Return a library that prints to stdout during the work."""
    print("Loading…")
    sys.stdout.write("more\n")
    return Outcome({"sqnr_db": math.inf, "text": "ü"}, "a table")


def failing(error):
    def work(progress):
        print("half a line")
        raise error

    return work


def test_json_is_exactly_one_object_on_stdout_whatever_libraries_print(capsys):
    run_command(chatty, as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"sqnr_db": "inf", "text": "ü"}
    assert "Loading…" in err


def test_without_json_the_text_is_on_stdout_and_the_chatter_is_not(capsys):
    run_command(chatty)
    out, _ = capsys.readouterr()
    assert out == "a table\n"


def test_brackets_in_texts_are_printed_as_they_are(capsys):
    run_command(lambda progress: Outcome({}, "folder [red]x[/red] :smile:"))
    assert capsys.readouterr().out == "folder [red]x[/red] :smile:\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RecipeError("rank is 0 or more, not -1."), FAILED, "rank is 0 or more, not -1."),
        (CheckpointError("a [bold] file\nof two lines."), FAILED, "a [bold] file"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a.mp4"), FAILED, "No space left on device: out/a.mp4."),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), FAILED, "Permission denied: /out."),
        (OSError("strange"), FAILED, "strange."),
        (MemoryError(), FAILED, "ran out of memory"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried …"),
            FAILED,
            "GPU ran out of memory",
        ),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_one_sentence_and_an_exit_code(capsys, error, code, words, as_json):
    with pytest.raises(typer.Exit) as exit_info:
        run_command(failing(error), as_json)
    assert exit_info.value.exit_code == code
    out, err = capsys.readouterr()
    assert "error: " in err
    assert words in err
    assert "Traceback" not in err
    if as_json:
        assert words in json.loads(out)["error"]
    else:
        assert out == ""


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(failing(ZeroDivisionError()))
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(failing(RuntimeError("shapes cannot be multiplied")))
