r"""A check of the published claim (arXiv 2605.27003) and of ours on OpenS2V-Eval, by a chain of the
project's own commands.

    python -m benchmarks.reproduce --opens2v OPENS2V --vbench-python .venv-vbench/bin/python \
        --work runs/reproduce
    python -m benchmarks.reproduce --opens2v OPENS2V --print            # the commands alone
    # the same chain on a laptop: minutes
    python -m benchmarks.reproduce --model tiny

Each command is printed, then run. All of them resume after an interruption, so the same line
resumes the whole chain. docs/reproduce.md lists its requirements and its differences from the
published run.
"""

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tempoquant
from benchmarks.json_line import publish
from benchmarks.reproduce_items import write_calibration
from benchmarks.reproduce_plan import PUBLISHED_MODEL, Chain, protocol_of
from benchmarks.reproduce_run import fail, find_program, run_all, text_of
from benchmarks.reproduce_table import print_rows, rows_of
from benchmarks.scale import commit_name, describe_machine
from tempoquant.device import default_device
from tempoquant.errors import TempoQuantError
from tempoquant.models.pipeline_folder import BUNDLED_MODELS
from tempoquant.placement.modes import MEMORY_MODES


def conclude(chain: Chain, device: str | None, json_file: Path | None) -> None:
    """Print the table and the JSON line.

    Args:
        device: the first that was used; None for this machine's best.
    """
    evaluation = json.loads((chain.evaluation / "evaluation.json").read_text(encoding="utf-8"))
    rows = rows_of(evaluation)
    name, num_items = evaluation["benchmark"]["name"], evaluation["benchmark"]["num_items"]
    print_rows(rows, f"{chain.model}, {name}, {num_items} items")
    if protocol_of(chain.model) is not protocol_of(PUBLISHED_MODEL):
        print("This is not the published model. Its figures show that the commands work, and check no claim.")
    record: dict[str, Any] = {
        "benchmark": "reproduce",
        "version": tempoquant.__version__,
        "commit": commit_name(),
        "model": chain.model,
        "machine": describe_machine(device or default_device()),
        "settings": evaluation["settings"],
        "environment": evaluation["environment"],
        "excluded": evaluation["benchmark"]["excluded_overlap"],
        "num_items": num_items,
        "commands": [text_of(command) for command in chain.commands()],
        "rows": rows,
    }
    publish(record, json_file)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options, and check them against each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PUBLISHED_MODEL, help="a folder, a hub id, tiny, or tiny-outliers")
    parser.add_argument("--opens2v", type=Path, metavar="ROOT", help="OpenS2V-Eval: Images and Open-Domain_Eval.json")
    parser.add_argument("--vbench-python", metavar="PATH", help="Python of an environment that has VBench")
    parser.add_argument("--vbench-cache", metavar="DIR", help="folder of VBench's weights")
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="for everything")
    parser.add_argument("--device", help="devices, as the commands take them: cuda, cpu, cuda:0,cuda:1")
    parser.add_argument(
        "--engine", choices=("local", "ray"), help="engine that runs the workers, as the commands take it"
    )
    parser.add_argument("--address", help="address of a running Ray cluster")
    parser.add_argument(
        "--memory", choices=MEMORY_MODES, help="memory mode of recording and generating, for all models"
    )
    parser.add_argument("--limit", type=int, help="evaluate only LIMIT items")
    parser.add_argument("--rtn", action="store_true", help="also quantize by rounding to nearest")
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the commands and stop")
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    found = parser.parse_args(arguments)
    if found.opens2v is None and found.model not in BUNDLED_MODELS:
        parser.error(f"{found.model} is evaluated on OpenS2V-Eval: give its folder with --opens2v")
    if found.vbench_cache is not None and found.vbench_python is None:
        parser.error("--vbench-cache belongs to --vbench-python: give both")
    return found


def chain_of(options: argparse.Namespace) -> Chain:
    """Return the chain of the options."""
    vbench = _given({"--vbench-python": options.vbench_python, "--vbench-cache": options.vbench_cache})
    place = _given({"--device": options.device, "--engine": options.engine, "--address": options.address})
    return Chain(
        options.model, options.opens2v, options.work, vbench, place, options.memory, options.limit, options.rtn
    )


def _given(flags: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(word for flag, value in flags.items() if value is not None for word in (flag, value))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    chain = chain_of(options)
    if options.only_print:
        print("\n".join(map(text_of, chain.commands())))
        return
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that no child is left running
    try:
        if chain.opens2v is not None:
            ids = write_calibration(chain.opens2v, chain.protocol.num_calibrated, chain.calibration)
            print(f"Calibrating on {', '.join(ids)}, which are not evaluated.")
        run_all(chain.commands(), find_program())
    except TempoQuantError as error:
        fail(str(error), 1)
    is_here = options.device is not None and options.engine != "ray"  # a Ray cluster's driver may have no such device
    conclude(chain, options.device.split(",")[0] if is_here else None, options.json)


if __name__ == "__main__":
    main()
