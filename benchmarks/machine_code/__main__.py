"""The kernels' machine code, counted without a GPU: registers, loops, instructions a number, and
the resulting time.

    python -m benchmarks.machine_code                              # every GPU generation, a table
    # Hopper alone, and a line of JSON for each kernel
    python -m benchmarks.machine_code --capability 90 --json FILE

Every figure is counted in code that Triton compiled here, or computed from such counts and from
datasheets. None was measured.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted code has no machine code

from rich.console import Console

from benchmarks.json_line import publish
from benchmarks.machine_code.block import WAYS, Way, block, kernels_of, linear
from benchmarks.machine_code.compiling import named_launches
from benchmarks.machine_code.counting import Counted, count, instructions_a_number
from benchmarks.machine_code.gpus import GPUS
from benchmarks.machine_code.listing import shortened
from benchmarks.machine_code.tables import block_table, kernel_table
from benchmarks.registry import VIDEO_TOKENS, shapes_of_block
from benchmarks.scale import commit_name


def counted_kernels(ways: Iterable[Way]) -> dict[int, dict[str, Counted]]:
    """Compile and count the kernels that ways need, by compute capability and name."""
    launches = dict(named_launches())
    return {
        capability: {name: count(name, launches[name], GPUS[capability]) for name in sorted(names)}
        for capability, names in kernels_of(ways).items()
    }


def chosen_kernels(parts: Iterable[str], capabilities: Iterable[int]) -> dict[int, dict[str, Counted]]:
    """Compile and count every launch that has one of the parts in its name and is for one of these
    GPUs.
    """
    return {
        capability: {
            name: count(name, launch, GPUS[capability])
            for name, launch in named_launches()
            if any(part in name for part in parts) and launch.min_capability <= capability <= launch.max_capability
        }
        for capability in capabilities
    }


def kernel_record(counted: Counted) -> dict[str, Any]:
    """Return the counts of one kernel."""
    loops = [
        {
            "instructions": loop.size,
            "by_kind": dict(shortened(loop.counts).most_common()),
            "units": loop.units,
            "tensor": dict(loop.tensor),
            "waits": dict(loop.waits),
            "load_bytes": dict(loop.loads),
            "store_bytes": dict(loop.stores),
        }
        for loop in counted.listing.loops
    ]
    record = {
        "kernel": counted.name,
        "capability": counted.gpu.capability,
        "registers": counted.registers,
        "spilled": counted.stack,
        "shared": counted.shared,
        "warps": counted.num_warps,
        "programs_a_multiprocessor": counted.programs,
        "instructions": len(counted.listing.names),
        "loops": loops,
    }
    if (number := instructions_a_number(counted)) is not None:
        record["instructions_a_number"] = number
    return record


def way_records(way: Way, kernels: dict[str, Counted]) -> Iterator[dict[str, Any]]:
    """Yield the times of a way by shape, and of a block, for each size of video."""
    for tokens in VIDEO_TOKENS.values():
        by_shape = [linear(way, kernels, shape) for shape in shapes_of_block(tokens)]
        whole = block(way, kernels, tokens)
        yield {
            "way": way.name,
            "capability": way.capability,
            "gpu": GPUS[way.capability].name,
            "video_tokens": tokens,
            "block_ms": {name: 1e3 * seconds for name, seconds in whole._asdict().items()},
            "ratio_to_bf16": {name: whole.bf16 / seconds for name, seconds in whole._asdict().items()},
            "shapes": [
                {"shape": list(each.shape), "bf16_ms": 1e3 * each.bf16, "project_ms": 1e3 * each.project}
                | {
                    f"{stage}_ms": {
                        name: 1e3 * getattr(found, name)
                        for name in ("issue", "tensor", "bytes", "largest", "sum", "expected")
                    }
                    for stage, found in (
                        ("quantize", each.quantize),
                        ("expand", each.expand),
                        ("multiply", each.multiply),
                    )
                }
                for each in by_shape
            ],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", choices=list(GPUS), default=list(GPUS), help="90 for 9.0")
    parser.add_argument("--only", nargs="+", help="count only kernels with one of these in their names, and no block")
    parser.add_argument(
        "--json", type=Path, help="append a JSON line for each kernel and each row of the tables to this file"
    )
    arguments = parser.parse_args()
    console = Console(width=240)
    ways = [way for way in WAYS if way.capability in arguments.capability and not arguments.only]
    kernels = counted_kernels(ways)
    if arguments.only:
        kernels = chosen_kernels(arguments.only, arguments.capability)
    console.print(kernel_table([each for named in kernels.values() for each in named.values()]))
    records = [kernel_record(each) for named in kernels.values() for each in named.values()]
    blocks = [record for way in ways for record in way_records(way, kernels[way.capability])]
    if blocks:
        console.print(block_table(blocks))
    if arguments.json:
        common = {"benchmark": "machine_code", "how": "counted", "commit": commit_name(), "machine": platform.machine()}
        for record in records + blocks:
            publish(common | record, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
