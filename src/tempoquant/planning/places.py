"""Where the denoisers of a pipeline are in each memory mode, in bytes on the device."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tempoquant.placement.modes import Memory
from tempoquant.planning.generation_memory import DenoiserBytes


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


def _resident(denoisers: Sequence[DenoiserBytes]) -> Places:
    all_of_them = sum(denoiser.total for denoiser in denoisers)
    return Places(all_of_them, [all_of_them] * len(denoisers), [all_of_them] * (len(denoisers) - 1))


def _swap(denoisers: Sequence[DenoiserBytes]) -> Places:
    """A slot for each part, as large as the largest that comes there, from the first step to the last."""
    parts = [(denoiser.rest, *denoiser.blocks) for denoiser in denoisers]
    slots = sum(max(sizes) for sizes in itertools.zip_longest(*parts, fillvalue=0))
    return Places(0, [slots] * len(denoisers), [slots] * (len(denoisers) - 1))


def _lean(denoisers: Sequence[DenoiserBytes]) -> Places:
    running = [denoiser.rest + _two_in_a_row(denoiser.blocks) for denoiser in denoisers]
    return Places(0, running, [max(pair) for pair in itertools.pairwise(running)])


def _two_in_a_row(blocks: Sequence[int]) -> int:
    """The block that runs and the next, which is copied meanwhile."""
    return max(sum(pair) for pair in zip(blocks, [*blocks[1:], 0], strict=True))


PLACES: Mapping[Memory, Callable[[Sequence[DenoiserBytes]], Places]] = {
    "resident": _resident,
    "swap": _swap,
    "lean": _lean,
}
"""By mode: from the bytes of each denoiser, the noisiest first."""
