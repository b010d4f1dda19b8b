"""The counts of a kernel's listing: its instructions by kind, its innermost loops, its loads, its
waits.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MIN_LOOP = 24
"""Instructions; shorter loops wait for a barrier, or end the kernel."""

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BRANCH = re.compile(r"\bBRA.*`\((\.L_x_\d+)\)")
_TENSOR = re.compile(r"^(HMMA|IMMA|QMMA|OMMA|HGMMA|QGMMA|IGMMA|UTC\w*MMA)")

# By the executing unit, with the first parts of their names; unnamed instructions run beside the
# others.
UNITS = {
    "float32": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"),
    "integer": (
        "LOP3",
        "IADD",
        "VIMNMX",
        "VIADD",
        "SHF",
        "SHL",
        "PRMT",
        "SEL",
        "FSEL",
        "FMNMX",
        "ISETP",
        "FSETP",
        "LEA",
        "F2FP",
        "SGXT",
        "BMSK",
        "IABS",
        "IMNMX",
        "FCHK",
        "VOTE",
        "PLOP3",
        "I2FP",
        "MOV",
        "VIMNMX3",
        "FMNMX3",
    ),
    "multiplier": ("IMAD", "IDP"),
    "special": ("MUFU", "F2I", "I2F", "F2F", "POPC", "FLO"),
    "memory": (
        "LDG",
        "STG",
        "LDS",
        "STS",
        "LDGSTS",
        "LDSM",
        "STSM",
        "SHFL",
        "LDL",
        "STL",
        "LDC",
        "LDTM",
        "STTM",
        "UTMALDG",
        "UTMASTG",
        "ATOM",
        "RED",
    ),
}


class Loop(NamedTuple):
    """One innermost loop, one iteration.

    Attributes:
        first, last: places of its instructions in the kernel.
        counts: by the instruction's name with its modifiers.
    """

    first: int
    last: int
    counts: Counter[str]

    @property
    def size(self) -> int:
        """Return the number of instructions."""
        return self.counts.total()

    @property
    def tensor(self) -> Counter[str]:
        """Return the instructions for tensor cores."""
        return Counter({name: count for name, count in self.counts.items() if _TENSOR.match(name)})

    @property
    def waits(self) -> Counter[str]:
        """Return barriers of a program, and waits for tensor cores and copies, with how many groups
        stay in flight.
        """
        return Counter(
            {
                name: count
                for name, count in self.counts.items()
                if name.startswith(("BAR.", "WARPGROUP.DEPBAR", "DEPBAR", "LDGDEPBAR", "SYNCS"))
            }
        )

    @property
    def loads(self) -> Counter[int]:
        """Count loads from device memory by bytes of a thread."""
        return _widths(self.counts, ("LDG", "LDGSTS"))

    @property
    def stores(self) -> Counter[int]:
        """Count stores to device memory by bytes of a thread."""
        return _widths(self.counts, ("STG",))

    @property
    def units(self) -> dict[str, int]:
        """Count instructions by the unit that executes them."""
        return units_of(self.counts)


class Listing(NamedTuple):
    """A whole kernel: its instructions, and its innermost loops that work."""

    names: tuple[str, ...]
    loops: tuple[Loop, ...]

    @property
    def outside(self) -> Counter[str]:
        """Return the instructions outside these loops, which every program runs once (or never, if
        a branch skips them).
        """
        within = {place for loop in self.loops for place in range(loop.first, loop.last + 1)}
        return Counter(name for place, name in enumerate(self.names) if place not in within)


def parse(listing: str) -> Listing:
    """Parse nvdisasm's output for one kernel."""
    texts: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(texts)
        elif found := _INSTRUCTION.match(line):
            texts.append(_PREDICATE.sub("", found.group(1)))
    names = tuple(_name_of(text) for text in texts)
    jumps = [
        (labels[target.group(1)], place)
        for place, text in enumerate(texts)
        if (target := _BRANCH.search(text)) and labels.get(target.group(1), place + 1) <= place
    ]
    spans = [span for span in jumps if span[1] - span[0] + 1 >= MIN_LOOP]
    spans = [span for span in spans if not any(_goes_back_into(span, other) for other in spans)]
    innermost = [span for span in spans if not any(_is_within(other, span) for other in spans if other != span)]
    loops = tuple(Loop(first, last, Counter(names[first : last + 1])) for first, last in sorted(innermost))
    return Listing(names, loops)


def units_of(counts: Counter[str]) -> dict[str, int]:
    """Sum instructions by unit; "other" runs beside these."""
    found = dict.fromkeys([*UNITS, "other"], 0)
    for name, count in counts.items():
        first = name.split(".")[0]
        unit = next((unit for unit, firsts in UNITS.items() if first in firsts or first.startswith("IADD3")), "other")
        found["integer" if first.startswith("IADD3") else unit] += count
    return found


def shortened(counts: Counter[str]) -> Counter[str]:
    """Count by the first part of the name, which is the operation."""
    short: Counter[str] = Counter()
    for name, count in counts.items():
        short[name.split(".")[0]] += count
    return short


def _name_of(text: str) -> str:
    name, *operands = text.split()
    if name in ("WARPGROUP.DEPBAR.LE", "DEPBAR.LE"):
        return " ".join([name, *operands[:2]])
    return name


def _is_within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _goes_back_into(span: tuple[int, int], loop: tuple[int, int]) -> bool:
    """Return whether it is no loop, but code behind the kernel's end that waits and branches back
    into a loop.
    """
    return loop[0] < span[0] <= loop[1] < span[1]


def _widths(counts: Counter[str], firsts: Sequence[str]) -> Counter[int]:
    widths: Counter[int] = Counter()
    for name, count in counts.items():
        parts = name.split(".")
        if parts[0] in firsts:
            bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
            widths[next((bits[part] for part in parts[1:] if part in bits), 32) // 8] += count
    return widths
