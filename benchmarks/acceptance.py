"""The whole chain, command by command: quantize three ways, evaluate against 16 bits, and make the
report.

    python -m benchmarks.acceptance                     # tiny-outliers, 24 held-out items; resumes
    python -m benchmarks.acceptance --seeds 0,1 --work runs/acceptance

`rtn`, `paper` and `default` get one format and, where they have one, a low-rank branch of one rank:
by default 2, the share of the bundled models' width that rank 32 has of the 14B model's. Prints
each command with its time, wall and processor, a table with 95 % intervals, and one JSON line.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tempoquant
from benchmarks.json_line import publish
from benchmarks.scale import commit_name, describe_machine

COLUMNS = {
    "final_latent_db": ("final latent, dB", 1.0, 1),
    "psnr_db": ("PSNR, dB", 1.0, 1),
    "ssim": ("SSIM", 1.0, 3),
    "motion_followed": ("motion followed, %", 100.0, 0),
    "appearance_kept": ("appearance kept, %", 100.0, 0),
}
"""The title, factor and digits of each metric. VMAF is left out: videos of the bundled models are
too small for it.
"""

LABELS = ("rtn", "paper", "ours")

_PROGRAM = "from tempoquant_command import main; main()"  # what the command `tempoquant` runs, in this Python


def commands(work: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """Return the commands that a person would type, without `tempoquant`."""
    of_format = ["--format", arguments.format]
    recipes = {
        "rtn": ["--recipe", "rtn", *of_format],
        "paper": ["--recipe", "paper", *of_format, "--rank", str(arguments.rank)],
        "ours": ["--recipe", "default", *of_format, "--rank", str(arguments.rank)],
    }
    folders = [str(work / label) for label in LABELS]
    evaluate = ["evaluate", arguments.model, *folders, "--benchmark", "tiny", "--seeds", arguments.seeds]
    if arguments.limit is not None:
        evaluate += ["--limit", str(arguments.limit)]
    out = str(work / "evaluation")
    return [
        *(["quantize", arguments.model, "-o", str(work / label), *recipes[label]] for label in LABELS),
        [*evaluate, "-o", out],
        ["report", out, "-o", str(work / "report.html")],
    ]


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run one command, and return its seconds. Raises SystemExit with its exit code if it fails."""
    words = shlex.join(["tempoquant", *command])
    print(f"$ {words}", file=sys.stderr, flush=True)
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *command], stdout=sys.stderr, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.returncode)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": words, "wall_s": time.perf_counter() - begin, "processor_s": processor}


def rows_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make a row for each model of an evaluation.json: its bits, and of each metric the mean with
    its interval or, in `difference`, the interval of the paired difference from 16 bits.
    """
    rows = []
    for model in document["models"]:
        found: dict[str, Any] = {"label": model["label"], "bits_per_weight": model["bits_per_weight"]}
        for row in document["summary"]:
            if row["label"] == model["label"] and row["metric"] in COLUMNS:
                found[row["metric"]] = {key: row[key] for key in ("mean", "difference", "low", "high", "n")}
        rows.append(found)
    return rows


def cell(metric: str, found: Mapping[str, Any] | None) -> str:
    """Write a cell such as "20.8 (20.4 … 21.2)", or "92 (Δ −4 … 2)" if the interval is of the
    difference from 16 bits.
    """
    if found is None:
        return "–"
    _, factor, digits = COLUMNS[metric]
    numbers = [found["mean"], *(found[key] for key in ("low", "high") if found[key] is not None)]
    mean, *limits = (f"{factor * number:.{digits}f}".replace("-", "−") for number in numbers)
    delta = "" if found["difference"] is None else "Δ "
    return f"{mean} ({delta}{' … '.join(limits)})" if limits else f"{mean} (n = {found['n']}: no interval)"


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print the table on the console."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for heading in ("bits a weight", *(title for title, _, _ in COLUMNS.values())):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = (cell(metric, row.get(metric)) for metric in COLUMNS)
        table.add_row(row["label"], f"{row['bits_per_weight']:.2f}", *cells)
    Console(width=160).print(table)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/acceptance"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--model", default="tiny-outliers", choices=("tiny", "tiny-outliers"))
    parser.add_argument("--format", default="nvfp4_m1", help="format of all three models (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=2, help="rank of both low-rank branches (default: %(default)s)")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT of the 24 items")
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    taken = [run(command) for command in commands(arguments.work, arguments)]
    document = json.loads((arguments.work / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    rows, items = rows_of(document), document["benchmark"]["num_items"]
    print_table(rows, f"{arguments.model}, {items} held-out items, seeds {arguments.seeds}; 95 % bootstrap intervals")
    record = {
        "benchmark": "acceptance",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "machine": describe_machine("cpu"),
        "commands": taken,
        "num_items": items,
        "rows": rows,
    }
    publish(record, arguments.json)


if __name__ == "__main__":
    main()
