"""W4A4 quantizers of other projects beside ours: same model, same calibration samples, same
held-out calls and videos.

    python -m benchmarks.peers WORK                                 # tiny-outliers, every peer
    python -m benchmarks.peers WORK --rows modelopt-nvfp4-svdquant-r2 tempoquant-nvfp4-paper-r2
    python -m benchmarks.peers WORK --model DIR --calibration a.jsonl --samples-from b.jsonl

Each peer runs its own code in its own virtual environment, .venv-peers/PEER, installed on first use
from benchmarks/peers/requirements-PEER.txt. Finished rows in WORK are kept; --again makes them
anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.job import request_arguments, request_of, write_job
from benchmarks.peers.rows import OURS, ROWS, Row
from benchmarks.peers.score import print_table, score_row
from tempoquant.cli.progress import RichProgress

ROOT = Path(__file__).parent.parent.parent
VENVS = ROOT / ".venv-peers"


def python_of(peer: str) -> Path:
    """Return the peer's interpreter; its environment is made first if none has these requirements.

    Raises:
        RuntimeError: pip failed; the message is its last line.
    """
    if peer == OURS:
        return Path(sys.executable)
    folder, requirements = VENVS / peer, Path(__file__).parent / f"requirements-{peer}.txt"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if not installed.is_file() or installed.read_text() != requirements.read_text():
        venv.create(folder, with_pip=True, clear=True)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip could not install {requirements.name}: {_last_line(done.stderr)}")
        shutil.copy(requirements, installed)  # last, as the mark of a complete environment
    return python


def make_row(work: Path, row: Row, timeout: float) -> dict[str, Any]:
    """Run one row's script and score its output; a failed row has the reason in `error`."""
    out = work / "out" / row.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    module = f"benchmarks.peers.run_{row.peer.replace('-', '_')}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        command = [python_of(row.peer), "-m", module, work.resolve(), row.name]
        with (out / "log.txt").open("w") as log:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=timeout, check=False
            )
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return failed(row, str(error) if isinstance(error, RuntimeError) else f"not finished after {timeout:.0f} s")
    if not (out / "row.json").is_file():
        return failed(row, f"exit status {done.returncode}: {_last_line((out / 'log.txt').read_text())}")
    return score_row(work, row)


def failed(row: Row, why: str) -> dict[str, Any]:
    """Make a result without figures. It is not written to WORK, so that the row is retried next
    time.
    """
    return {"name": row.name, "row": row.label, "format": row.format, "rank": row.rank, "error": why}


def make_rows(work: Path, rows: Sequence[Row], again: bool, timeout: float, on_row: Callable[[], None]) -> list[Any]:
    """Make all rows, one after the other; finished ones are only scored, unless `again`."""
    results = []
    for row in rows:
        finished = (work / "out" / row.name / "row.json").is_file()
        results.append(score_row(work, row) if finished and not again else make_row(work, row, timeout))
        on_row()
    return results


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    request_arguments(parser)
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--rows", nargs="+", choices=names, default=names, metavar="ROW", help="measure only these rows"
    )
    parser.add_argument("--again", action="store_true", help="measure finished rows again")
    parser.add_argument("--timeout", type=float, default=3600, help="time limit of a row, in seconds")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if row.name in arguments.rows]
    with RichProgress() as progress:
        write_job(arguments.work, request_of(arguments), progress)
        on_row = progress.start("Rows", len(rows))
        results = make_rows(arguments.work, rows, arguments.again, arguments.timeout, on_row)
    print_table(results, f"{arguments.model}: SQNR, dB (higher is better), {arguments.prompts} held-out prompts")
    print(json.dumps({"benchmark": "peers", "model": arguments.model, "seed": arguments.seed, "results": results}))


if __name__ == "__main__":
    main()
