"""Where the denoisers of a pipeline are in each memory mode, in bytes on the device."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tempoquant.placement.streaming import Memory
from tempoquant.planning.generation_memory import ExpertBytes


class Places(NamedTuple):
    """Bytes of denoisers on the device.

    Attributes:
        away: while none runs.
        running: while each runs.
        changing: while each takes the place of the one before; one fewer.
    """

    away: int
    running: list[int]
    changing: list[int]


def _resident(experts: Sequence[ExpertBytes]) -> Places:
    all_of_them = sum(expert.total for expert in experts)
    return Places(all_of_them, [all_of_them] * len(experts), [all_of_them] * (len(experts) - 1))


def _swap(experts: Sequence[ExpertBytes]) -> Places:
    """A slot for each part, as large as the largest that comes there, from the first step to the last."""
    parts = [(expert.rest, *expert.blocks) for expert in experts]
    slots = sum(max(sizes) for sizes in itertools.zip_longest(*parts, fillvalue=0))
    return Places(0, [slots] * len(experts), [slots] * (len(experts) - 1))


def _lean(experts: Sequence[ExpertBytes]) -> Places:
    running = [expert.rest + _two_in_a_row(expert.blocks) for expert in experts]
    return Places(0, running, [max(pair) for pair in itertools.pairwise(running)])


def _two_in_a_row(blocks: Sequence[int]) -> int:
    """The block that runs and the next, which is copied meanwhile."""
    return max(sum(pair) for pair in zip(blocks, [*blocks[1:], 0], strict=True))


PLACES: Mapping[Memory, Callable[[Sequence[ExpertBytes]], Places]] = {
    "resident": _resident,
    "swap": _swap,
    "lean": _lean,
}
"""By mode: from the bytes of each denoiser, the noisiest first."""
