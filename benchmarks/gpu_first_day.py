"""The first ten minutes on a GPU: whether the kernels are right, their speed, and the design to
keep.

    python -m benchmarks.gpu_first_day --json first_day.jsonl              # ten minutes
    python -m benchmarks.gpu_first_day --json first_day.jsonl --seconds 300
    # small, on a CPU, by plain PyTorch
    python -m benchmarks.gpu_first_day --json dry.jsonl --dry-run

Steps come in the order of their worth, `benchmarks.gpu_first_day_steps` has them. Each runs in its
own process, with its own limit, and its result is appended to the file at once: an interrupted step
loses only itself. The same command resumes with the remaining steps. `make gpu-bundle` builds a
folder for a machine without package registries.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DONE, FAILED, CUT, LEFT_OUT = "done", "failed", "cut", "left out"

LEAST_SECONDS = 5.0
"""With less time left, no step begins."""


class Step(NamedTuple):
    """One measurement.

    Attributes:
        name: for the file, and for `--step`.
        seconds: its limit.
        command: runs it; the last line that it prints is a JSON object.
        missing: the reason why it cannot run here; empty if it can.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    missing: str = ""


def run_steps(
    steps: Sequence[Step], file: Path, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Iterator[dict[str, Any]]:
    """Run the steps that the file does not have, and append a line for each step once it ends."""
    done = {record["step"] for record in records_of(file) if record["status"] == DONE}
    if file.exists() and not file.read_text(encoding="utf-8").endswith("\n"):
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n")  # end a line that was cut off
    end = clock() + seconds
    for step in steps:
        if step.name in done:
            continue
        begun, limit = clock(), min(step.seconds, end - clock())
        if step.missing:
            found: dict[str, Any] = {"status": LEFT_OUT, "why": step.missing}
        elif limit < LEAST_SECONDS:
            found = {"status": LEFT_OUT, "why": f"it needs {seconds:.0f} seconds, and {max(0.0, limit):.0f} were left"}
        else:
            found = run_step(step, limit)
        record = {"step": step.name, **found, "seconds": round(clock() - begun, 1)}
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        yield record


def records_of(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a file so far, without a last one that was cut off."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def run_step(step: Step, seconds: float) -> dict[str, Any]:
    """Return the outcome of one process; it and its children are ended when its time is over."""
    process = subprocess.Popen(
        step.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return {"status": CUT, "why": f"it took longer than {seconds:.0f} seconds", "output": out[-2000:]}
    last = next((line for line in reversed(out.splitlines()) if line.startswith("{")), None)
    if process.returncode != 0 or last is None:
        why = f"exit code {process.returncode}" if process.returncode else "no JSON was printed"
        return {"status": FAILED, "why": why, "output": (out[-2000:] + err[-4000:])}
    return {"status": DONE, "result": json.loads(last)}


def planned_steps(dry_run: bool) -> list[Step]:
    """Return every step, in the order of its worth."""
    from benchmarks.gpu_first_day_steps import STEPS, device_or_why

    device, why = device_or_why()
    steps = []
    for name, step in STEPS.items():
        missing = "" if dry_run and step.on_a_cpu else why if step.needs_gpu else ""
        if not missing and step.needs_program and shutil.which(step.needs_program) is None:
            missing = f"there is no {step.needs_program} here"
        options = ("--dry-run",) if dry_run else ("--device", device)
        command = (sys.executable, "-m", "benchmarks.gpu_first_day", "--step", name, *options)
        steps.append(Step(name, step.seconds, command, missing))
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=Path("gpu_first_day.jsonl"), help="file of the results, one line for each step"
    )
    parser.add_argument("--seconds", type=float, default=590.0, help="time limit of all steps together")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--dry-run", action="store_true", help="run small versions of the steps that a CPU can run")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        from benchmarks.gpu_first_day_steps import run_here

        print(json.dumps(run_here(arguments.step, "cpu" if arguments.dry_run else arguments.device)), flush=True)
        return 0
    steps = [each for each in planned_steps(arguments.dry_run) if not arguments.only or each.name in arguments.only]
    failed = 0
    for record in run_steps(steps, arguments.json, arguments.seconds):
        failed += record["status"] == FAILED
        print(f"{record['step']:>20}: {record['status']}, {record['seconds']} s. {record.get('why', '')}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
