"""The effect of other work on a command: its time alone, and beside as many busy processes as the
machine has cores.

    # quantizes `tiny` by rounding to nearest: minutes
    python -m benchmarks.busy_machine
    # or any other command; OUT is a new path each time
    python -m benchmarks.busy_machine --repeat 3 demo -o OUT

OpenMP's threads wait for each other in three ways: asleep, as the command sets them; spinning, the
runtime's default; and alone, with no thread to wait for. Their order rotates with each repetition,
and medians count.
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tempoquant
from benchmarks.json_line import publish
from benchmarks.scale import commit_name, describe_machine
from tempoquant_command import USERS

COMMAND = ("quantize", "tiny", "--recipe", "rtn", "-o", "OUT")
WAYS: dict[str, dict[str, str]] = {
    "asleep": {},
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # GNU's own default; any word of a user's makes the command say nothing
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_PROGRAM = "from tempoquant_command import main; main()"
_BUSY = "import time\nend = time.monotonic() + 3600\nwhile time.monotonic() < end: pass"  # for an hour, should we die


@contextlib.contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """Keep as many processes busy within this context."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(command: Sequence[str], way: Mapping[str, str]) -> tuple[float, float]:
    """Run a command, and return seconds on the clock and of the processor. Raises SystemExit with
    its exit code if it fails.
    """
    clean = {name: value for name, value in os.environ.items() if name not in (*USERS, "OMP_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [word.replace("OUT", str(Path(scratch) / "out")) for word in command]
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *arguments], env={**clean, **way}, stdout=subprocess.DEVNULL, check=False
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.returncode)
    processor_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, processor_s


def measure(command: Sequence[str], num_repetitions: int, num_others: int) -> list[dict[str, Any]]:
    """Measure a row for each way: medians of the seconds, alone and beside others."""
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {(way, b): [] for b in (False, True) for way in WAYS}
    for repetition in range(num_repetitions):
        for is_busy in (False, True):
            with busy(num_others * is_busy):
                for way in list(WAYS)[:: 1 if repetition % 2 == 0 else -1]:
                    found[way, is_busy].append(run(command, WAYS[way]))

    def medians(way: str, is_busy: bool) -> dict[str, float]:
        name = "busy" if is_busy else "alone"
        wall, processor = (statistics.median(seconds) for seconds in zip(*found[way, is_busy], strict=True))
        return {f"{name}_s": wall, f"{name}_processor_s": processor}

    return [{"way": way, **medians(way, False), **medians(way, True)} for way in WAYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--others", type=int, default=os.cpu_count(), help="number of busy processes (default: one for each core)"
    )
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="arguments of tempoquant; OUT becomes a new path")
    arguments = parser.parse_args()
    command = arguments.command or COMMAND
    rows = measure(command, arguments.repeat, arguments.others)
    print(f"`tempoquant {' '.join(command)}`, seconds (processor seconds) beside {arguments.others} busy processes:")
    print("| threads wait | alone | beside them | times |\n|---|---|---|---|")
    for row in rows:
        alone, beside = (f"{row[f'{key}_s']:.0f} ({row[f'{key}_processor_s']:.0f})" for key in ("alone", "busy"))
        print(f"| {row['way']} | {alone} | {beside} | {row['busy_s'] / row['alone_s']:.1f} |")
    publish(
        {
            "benchmark": "busy_machine",
            "version": tempoquant.__version__,
            "commit": commit_name(),
            "machine": describe_machine("cpu"),
            "command": list(command),
            "rows": rows,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
