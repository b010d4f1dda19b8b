"""The counts and the times as tables for people; every title says that they were counted."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.machine_code.counting import Counted, numbers_a_thread, tiles_a_time
from benchmarks.machine_code.listing import Loop


def kernel_table(kernels: Sequence[Counted]) -> Table:
    """Make a table with a row a loop: a thread's resources, and the loop's instructions."""
    table = Table(title="Counted in machine code compiled here, not measured", title_justify="left")
    for name in (
        "kernel",
        "cc",
        "registers",
        "spilled",
        "shared",
        "programs",
        "loop",
        "a number",
        "float",
        "integer",
        "memory",
        "tensor",
        "waits",
        "loads",
        "stores",
    ):
        is_text = name in ("kernel", "tensor", "waits")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for counted in kernels:
        what = (
            counted.name,
            str(counted.gpu.capability),
            str(counted.registers),
            str(counted.stack),
            str(counted.shared),
            str(counted.programs),
        )
        for loop in counted.listing.loops:
            table.add_row(*what, *_of_loop(counted, loop))
            what = ("",) * len(what)
    return table


def block_table(blocks: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table with a row for each way and size of video."""
    table = Table(
        title="A block's ten linears: computed from counts and datasheets, not measured; milliseconds, and BF16's "
        "least time over ours",
        title_justify="left",
    )
    for name in ("GPU", "way", "tokens", "BF16", "expected", "largest", "sum", "BF16 / expected", "/ largest", "/ sum"):
        table.add_column(name, justify="left" if name in ("GPU", "way") else "right")
    for each in blocks:
        ms, ratio = each["block_ms"], each["ratio_to_bf16"]
        table.add_row(
            each["gpu"],
            each["way"],
            f"{each['video_tokens']:,}",
            *(f"{ms[name]:.2f}" for name in ("bf16", "expected", "largest", "sum")),
            *(f"{ratio[name]:.2f}" for name in ("expected", "largest", "sum")),
        )
    return table


def _of_loop(counted: Counted, loop: Loop) -> tuple[str, ...]:
    a_number = ""
    if "BLOCK_COLUMNS" in counted.launch.arguments:
        a_number = f"{loop.size / tiles_a_time(counted) / numbers_a_thread(counted):.1f}"
    units = loop.units
    return (
        str(loop.size),
        a_number,
        str(units["float32"]),
        str(units["integer"]),
        str(units["memory"]),
        _listed(loop.tensor),
        _listed(loop.waits),
        _widths(loop.loads),
        _widths(loop.stores),
    )


def _listed(counts: Mapping[str, int]) -> str:
    return "\n".join(f"{count} {name}" for name, count in counts.items())


def _widths(counts: Mapping[int, int]) -> str:
    return " ".join(f"{count}×{width}B" for width, count in sorted(counts.items(), reverse=True))
