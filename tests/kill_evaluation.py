"""Kill an evaluation before and after every rename and inside every line it appends, start it
again, and look.

    python -m tests.kill_evaluation

Runs are forked from one process that has imported everything, and killed with SIGKILL. The bundled
model is evaluated beside itself, so that every number of the result is known as well.
"""

import os
import signal
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tempoquant.evaluate import generation
from tempoquant.evaluate.benchmark_sets.bundled import load_bundled
from tempoquant.evaluate.evaluation import evaluate
from tempoquant.evaluate.evaluation_folder import EvaluationFolder, Take
from tempoquant.evaluate.metrics.measures import CEILING_DB
from tempoquant.evaluate.plan import Model
from tempoquant.evaluate.request import Request
from tests.kill_and_resume import finished, forked
from tests.recorded import CPU, SETTINGS, SOURCE

NUM_ITEMS = 2
REQUEST = Request(
    Model("16-bit", SOURCE), [Model("again", SOURCE)], load_bundled(NUM_ITEMS), SETTINGS.replace(num_steps=2)
)
_FEWEST_KILLS = 30  # four videos of five files each, before and after, beside the lines of manifest and metrics


def work(output: Path, log: Path) -> None:
    """Evaluate in this process; every generation that begins is noted in `log`, with whether it was
    needed.
    """
    torch.set_num_threads(1)
    original = generation._generate

    def noting(folder: EvaluationFolder, plan: Any, item: Any, take: Take, *arguments: Any) -> Any:
        needed = not folder.place("latents", take).is_file()
        with log.open("a") as stream:
            stream.write(f"{'needed' if needed else 'twice'} {take.label} {take.id}\n")
        return original(folder, plan, item, take, *arguments)

    generation._generate = noting
    evaluate(REQUEST, output, CPU)


def work_until_new_moment(output: Path, log: Path, covered: Path) -> None:
    """Do the work, killed at the first moment at which no run was killed so far, as `covered` lists
    them.
    """
    known = Counter(covered.read_text().splitlines())
    replace, write = os.replace, os.write
    passed: Counter[str] = Counter()

    def die_at(moment: str) -> None:
        passed[moment] += 1
        if passed[moment] > known[moment]:
            with covered.open("a") as stream:
                stream.write(f"{moment}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def replacing(source: Any, target: Any) -> None:
        place = Path(target).relative_to(output).as_posix()
        if f"before {place}" not in known:
            die_at(f"before {place}")
        replace(source, target)
        if f"after {place}" not in known:
            die_at(f"after {place}")

    def writing(handle: int, content: bytes) -> int:
        line = f"inside {content[:60].decode(errors='replace')}"
        if content.startswith(b'{"label"') and line not in known:
            write(handle, content[: len(content) // 2])
            die_at(line)
        return write(handle, content)

    os.replace, os.write = replacing, writing
    work(output, log)


def check() -> int:
    """Kill at every moment; how many kills there were. Raises AssertionError where something is
    lost or done twice.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output, log, covered = Path(scratch) / "out", Path(scratch) / "log", Path(scratch) / "covered"
        covered.touch()
        num_kills = 0
        while not finished(forked(lambda: work_until_new_moment(output, log, covered))):
            num_kills += 1
            if num_kills > 500:
                raise AssertionError("the evaluation never ended")
        if num_kills < _FEWEST_KILLS:
            raise AssertionError(f"{num_kills} kills: an evaluation has more moments than that")
        if "twice" in log.read_text():
            raise AssertionError(f"a finished video was generated again: {log.read_text()}")
        require_complete(output)
        log.write_text("")
        if not finished(forked(lambda: work(output, log))) or log.read_text():
            raise AssertionError("a complete evaluation generated something again")
    return num_kills


def require_complete(output: Path) -> None:
    """Raise unless every video is there and measured once, and a model is to itself what it should
    be.
    """
    folder = EvaluationFolder(output)
    wanted = {Take(label, item.id, 0) for label in ("16-bit", "again") for item in REQUEST.benchmark.items}
    takes = [(take.label, take.id) for take in folder.takes()]
    num_lines = len((output / "manifest.jsonl").read_text().splitlines())
    if set(folder.takes()) != wanted or set(folder.measured()) != wanted or num_lines != len(wanted):
        raise AssertionError(f"{takes}, {num_lines} lines: not every video once")
    for take in wanted:
        metrics = folder.measured()[take]
        if take.label == "again" and (metrics["psnr_db"], metrics["final_latent_db"]) != (CEILING_DB, CEILING_DB):
            raise AssertionError(f"{take}: the same model made another video")
    if left := [str(file) for file in output.rglob(".?*") if file.name != ".lock"]:
        raise AssertionError(f"half written files are left: {left}")


def main() -> None:
    """Run the command line."""
    print(f"{check()} kills survived, nothing lost and nothing generated twice")


if __name__ == "__main__":
    main()
