"""The runner of a chain of commands: it prints each one first, and ends at the first that fails,
and by Ctrl-C.

Nothing heavy is imported here.
"""

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

PROGRAM = "tempoquant"
INTERRUPTED = 130  # 128 + SIGINT, as in shells
GOES_ON = "the same command resumes it"


def text_of(command: Sequence[str]) -> str:
    """Return a command as a user types it."""
    return shlex.join([PROGRAM, *command])


def find_program() -> list[str]:
    """Return the `tempoquant` of this Python, else the one on the path. Raises SystemExit with a
    sentence.
    """
    found = shutil.which(PROGRAM, path=str(Path(sys.executable).parent)) or shutil.which(PROGRAM)
    if found is None:
        fail(f"there is no {PROGRAM} beside {sys.executable}: install the package there (pip install -e .).", 1)
    return [found]


def run_all(commands: Sequence[Sequence[str]], program: Sequence[str]) -> None:
    """Print and run each command.

    Args:
        program: the words before a command's own.

    Raises SystemExit with the exit status of the first that fails, or 130 after Ctrl-C.
    """
    for number, command in enumerate(commands, start=1):
        print(f"\n[{number}/{len(commands)}] {text_of(command)}", flush=True)
        status = _run([*program, *command])
        if status == INTERRUPTED:
            fail(f"interrupted: finished work is kept, and {GOES_ON}.", INTERRUPTED)
        if status:
            why = f"`{text_of(command)}` ended with status {status} and printed the reason above"
            fail(f"{why}; once that is repaired, {GOES_ON}.", status)


def _run(program: Sequence[str]) -> int:
    """Return the exit status; 128 + the number of the signal that ended it. The child always ends
    first.
    """
    with subprocess.Popen(program) as child:
        try:
            status = child.wait()
        except KeyboardInterrupt:  # the terminal has told the child too, which stores its work
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            status = INTERRUPTED
            _await_or(signal.SIGINT, child)
        except BaseException:
            _await_or(signal.SIGTERM, child, at_once=True)
            raise
    return status if status >= 0 else 128 - status


def _await_or(number: signal.Signals, child: "subprocess.Popen[bytes]", at_once: bool = False) -> None:
    """Wait for the child's end, and signal it if nobody has."""
    try:
        child.wait(timeout=0 if at_once else 5)
    except subprocess.TimeoutExpired:
        child.send_signal(number)
        child.wait()


def fail(sentence: str, status: int) -> NoReturn:
    """End with a sentence on stderr."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(status)
