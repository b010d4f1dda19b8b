"""Kill a run at any moment, start it again, and compare the result with that of a run nobody
disturbed.

    python -m tests.kill_and_resume --random 25 --commits --seed 0

Runs are forked from one process that has imported everything, and they are killed with SIGKILL:
nothing can be tidied up. `--random` lets each run live for a random part of the time a whole one
takes. `--commits` kills before and after every rename of the whole work: a run dies at its first
rename, is started again and dies right after it, and so on.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tempoquant
from tempoquant import Recipe
from tempoquant.quantizing import quantize

RECIPE = Recipe.load("paper").replace(num_prompts=2, num_steps=6, rank=2, samples_per_denoiser=6, num_frames=9)
_MAX_RUNS = 2000
_FEWEST_RENAMES = 80  # before and after each: two experts of four blocks, their shards, samples and components


def work(output: Path) -> None:
    """Do the whole work, in this process."""
    torch.set_num_threads(1)
    quantize("tiny", output, RECIPE, device="cpu")


def forked(body: Callable[[], None]) -> int:
    """Start `body` in its own process; return its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        body()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def finished(pid: int) -> bool:
    """Wait for a process; return whether it reached its end, or was killed. Raises if it failed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        raise AssertionError(f"a run failed instead of finishing or being killed: status {status}")
    return True


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def require_same(output: Path, reference: dict[str, bytes], where: str) -> None:
    """Raise when a result differs from the undisturbed one, or something is left beside it."""
    found = all_bytes(output)
    different = sorted(name for name in found.keys() | reference.keys() if found.get(name) != reference.get(name))
    if different:
        raise AssertionError(f"{where}: {different[0]} differs from the run that nobody disturbed")
    if left := [entry.name for entry in output.parent.iterdir() if entry != output]:
        raise AssertionError(f"{where}: {left} is left beside the result")


def killed_at_random(folder: Path, whole_s: float, chance: random.Random) -> str:
    """Let a run live for a random time, twice; then let it finish."""
    moments: list[str] = []
    while len(moments) < 2:
        pid = forked(lambda: work(folder / "out"))
        moment = chance.uniform(0.0, whole_s)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        if finished(pid):  # before it could be killed: what was left was too little for this moment
            shutil.rmtree(folder / "out")
            moments.clear()
        else:
            moments.append(f"{moment:.2f} s")
    if not finished(forked(lambda: work(folder / "out"))):
        raise AssertionError("the last run was killed by something else")
    return f"killed after {' and '.join(moments)}"


def work_until_new_rename(output: Path, covered: Path) -> None:
    """Do the work, killed before or after the first rename at which no run was killed so far, as
    `covered` lists them.
    """
    known = set(covered.read_text().splitlines())
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def renaming(source: object, target: object, *, original: Callable[..., None] = original) -> None:
            place = Path(str(target)).relative_to(output.parent).as_posix()
            for when in ("before", "after"):
                if when == "after":
                    original(source, target)
                if f"{when} {place}" not in known:
                    with covered.open("a") as stream:
                        stream.write(f"{when} {place}\n")
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, renaming)
    work(output)


def killed_at_every_rename(folder: Path) -> str:
    """Kill before and after each rename, once, until a run has none left."""
    covered = folder.with_suffix(".covered")
    covered.touch()
    for number in range(_MAX_RUNS):
        if finished(forked(lambda: work_until_new_rename(folder / "out", covered))):
            return f"{number} kills"
    raise AssertionError(f"the work never ended in {_MAX_RUNS} runs")


def check(num_random: int, commits: bool, seed: int, say: Callable[[str], None] = print) -> int:
    """Run everything; how many kills were survived. Raises AssertionError at the first
    difference.
    """
    with tempfile.TemporaryDirectory() as scratch:
        reference_folder = Path(scratch) / "reference"
        reference_folder.mkdir()
        started = time.monotonic()
        if not finished(forked(lambda: work(reference_folder / "out"))):
            raise AssertionError("the reference run was killed")
        whole_s = time.monotonic() - started
        reference = all_bytes(reference_folder / "out")
        chance, num_kills = random.Random(seed), 0
        for number in range(num_random):
            folder = Path(scratch) / f"random-{number}"
            folder.mkdir()
            where = killed_at_random(folder, whole_s, chance)
            require_same(folder / "out", reference, where)
            shutil.rmtree(folder)
            num_kills += 2
            say(f"{number + 1} of {num_random}: {where}: the same bytes")
        if commits:
            folder = Path(scratch) / "commits"
            folder.mkdir()
            where = killed_at_every_rename(folder)
            if int(where.split()[0]) < _FEWEST_RENAMES:
                raise AssertionError(f"{where}: the work has more renames than that")
            require_same(folder / "out", reference, where)
            num_kills += int(where.split()[0])
            say(f"before and after every rename, {where}: the same bytes")
    return num_kills


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=25, help="how many runs are killed at random moments")
    parser.add_argument("--commits", action="store_true", help="also kill before and after every rename")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"tempoquant {tempoquant.__version__}, seed {arguments.seed}")
    print(f"{check(arguments.random, arguments.commits, arguments.seed)} kills survived, 0 differences")


if __name__ == "__main__":
    main()
