"""Compile every Triton kernel that a Wan model launches, for every GPU generation, on a machine
without a GPU.

    python -m tests.kernels.compile_all [--capability 90 …] [--only PART-OF-A-NAME …] [--json FILE]

The table form: every module of `tempoquant.kernels` that launches a kernel defines

    def specializations() -> NamedLaunches:   # kernels/launch.py: yields (name, Launch)

in which each `Launch` is made by the function that makes the launch of a run, from tensors on the
device "meta" in Wan's shapes. Types, alignment and constants are derived from the arguments as
Triton derives them at a launch, so that what is compiled here is what runs. `Launch.min_capability`
says below which compute capability a kernel is not compiled (89 for those that convert to FP8),
`Launch.max_capability` above which another takes its place. A name is short and unique within its
module ("fp8 nvfp4_m1 rank 32").

Printed for each: registers a thread, bytes spilled, static and dynamic shared memory, all from
ptxas.
"""

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import triton

from benchmarks.machine_code.compiling import compile_for, named_launches
from tempoquant.kernels.launch import Launch

CAPABILITIES = (80, 89, 90, 100, 120)


class Compiled(NamedTuple):
    """The report of ptxas on one kernel. Bytes; `error` is empty if it compiled."""

    kernel: str
    name: str
    capability: int
    num_warps: int
    registers: int
    spilled: int
    shared: int
    error: str


def compiled(name: str, launch: Launch, capability: int) -> Compiled:
    """Compile one launch to a cubin; a failure is a row too."""
    row = Compiled(launch.kernel.__name__, name, capability, launch.options.get("num_warps", 4), 0, 0, 0, "")
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            binary = compile_for(launch, capability)
    except Exception as error:  # whatever the compiler raises is the finding
        return row._replace(error=f"{type(error).__name__}: {str(error).strip() or log.getvalue().strip()}"[-2000:])
    registers = max((int(number) for number in re.findall(r"Used (\d+) registers", log.getvalue())), default=0)
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", log.getvalue()))
    if not binary.asm["cubin"] or registers == 0:
        return row._replace(error=f"no report of ptxas: {log.getvalue()[-500:]!r}")
    return row._replace(registers=registers, spilled=spilled, shared=binary.metadata.shared)


def compile_all(capabilities: tuple[int, ...] = CAPABILITIES, only: tuple[str, ...] = ("",)) -> Iterator[Compiled]:
    """Compile every launch whose name has one of `only` in it, for every capability that it is
    for.
    """
    triton.knobs.compilation.always_compile = True  # a cached cubin comes without ptxas's report
    triton.knobs.nvidia.dump_ptxas_log = True
    for name, launch in named_launches():
        if any(part in name for part in only):
            for capability in capabilities:
                if launch.min_capability <= capability <= launch.max_capability:
                    yield compiled(name, launch, capability)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--only", nargs="+", default=("",), help="compile only what has one of these in its name")
    parser.add_argument("--json", help="write the table here as well")
    options = parser.parse_args()
    rows = []
    print(f"{'kernel':<58}{'cc':>4}{'warps':>6}{'registers':>10}{'spilled':>8}{'shared':>8}")
    for row in compile_all(tuple(options.capability), tuple(options.only)):
        rows.append(row)
        what = f"{row.registers:>10}{row.spilled:>8}{row.shared:>8}" if not row.error else f"  {row.error}"
        print(f"{row.name:<58}{row.capability:>4}{row.num_warps:>6}{what}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([row._asdict() for row in rows], file, indent=1)
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
