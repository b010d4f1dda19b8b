"""The denoisers of a pipeline in each memory mode: bytes on the device, in RAM, and copied between
them.

A mode is one entry of `PLACES`; everything else that plans asks the table.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tempoquant.placement.modes import Memory
from tempoquant.planning.generation_memory import DenoiserBytes


@dataclass(frozen=True)
class Places:
    """Bytes of denoisers.

    Attributes:
        away: on the device while none runs.
        running: on the device while each runs.
        changing: on the device while each takes the place of the one before; one fewer.
        pinned: in page-locked RAM while generating.
        read_ahead: in other RAM while generating: of what was read and is not on the device yet.
        copied_first: to the device before the first step, with nothing to run beside it.
        copied_between: to the device during the last call of the denoiser before, for each but the
            first.
        copied_each_call: to the device during each call of each denoiser.
        read_each_call: from files for each of them, in the dtypes of the files; empty for none.
        read_first: from files at the first call of each denoiser, with nothing to run beside it.
        holds_all: whether RAM holds all denoisers at once, as they load or as they wait.
    """

    away: int
    running: Sequence[int]
    changing: Sequence[int]
    pinned: int
    copied_first: int
    copied_between: Sequence[int]
    copied_each_call: Sequence[int]
    read_ahead: int = 0
    read_each_call: Sequence[int] = ()
    read_first: Sequence[int] = ()
    holds_all: bool = True

    @property
    def from_disk(self) -> bool:
        """Return whether what is copied is read from files, and not from RAM."""
        return bool(self.read_each_call)


def _resident(denoisers: Sequence[DenoiserBytes]) -> Places:
    all_of_them, others = sum(denoiser.total for denoiser in denoisers), len(denoisers) - 1
    return Places(
        away=all_of_them,
        running=[all_of_them] * len(denoisers),
        changing=[all_of_them] * others,
        pinned=0,
        copied_first=0,
        copied_between=[0] * others,
        copied_each_call=[0] * len(denoisers),
    )


def _swap(denoisers: Sequence[DenoiserBytes]) -> Places:
    """Return the places with a slot for each part, as large as the largest part in it, from the
    first step to the last.
    """
    parts = [(denoiser.rest, *denoiser.blocks) for denoiser in denoisers]
    slots, others = sum(max(sizes) for sizes in itertools.zip_longest(*parts, fillvalue=0)), len(denoisers) - 1
    first, *later = (denoiser.total for denoiser in denoisers)
    return Places(
        away=0,
        running=[slots] * len(denoisers),
        changing=[slots] * others,
        pinned=_pinned(denoisers),
        copied_first=first,
        copied_between=later,
        copied_each_call=[0] * len(denoisers),
    )


def _lean(denoisers: Sequence[DenoiserBytes]) -> Places:
    running = [denoiser.rest + _two_in_a_row(denoiser.blocks) for denoiser in denoisers]
    return Places(
        away=0,
        running=running,
        changing=[max(pair) for pair in itertools.pairwise(running)],
        pinned=_pinned(denoisers),
        copied_first=0,
        copied_between=[0] * (len(denoisers) - 1),
        copied_each_call=[denoiser.total for denoiser in denoisers],
    )


def _pinned(denoisers: Sequence[DenoiserBytes]) -> int:
    return sum(denoiser.pinned for denoiser in denoisers)


def _disk(denoisers: Sequence[DenoiserBytes]) -> Places:
    """Count one block; what lies in no block stays until another denoiser runs, and is read when
    no block is.
    """
    blocks = [sum(denoiser.blocks) for denoiser in denoisers]
    largest = max(block for denoiser in denoisers for block in denoiser.blocks)
    rest = max(denoiser.rest for denoiser in denoisers)
    running = [denoiser.rest + max(denoiser.blocks) for denoiser in denoisers]
    return Places(
        away=rest,
        running=running,
        changing=[max(pair) for pair in itertools.pairwise(running)],
        pinned=0,
        copied_first=denoisers[0].rest,
        copied_between=[denoiser.rest for denoiser in denoisers[1:]],
        copied_each_call=blocks,
        read_ahead=max(2 * largest, rest),
        read_each_call=[_stored(denoiser, size) for denoiser, size in zip(denoisers, blocks, strict=True)],
        read_first=[_stored(denoiser, denoiser.rest) for denoiser in denoisers],
        holds_all=False,
    )


def _stored(denoiser: DenoiserBytes, num_bytes: int) -> int:
    """Return the bytes of files that hold some of a denoiser's weights, if all are stored alike."""
    return num_bytes if denoiser.stored is None else round(num_bytes * denoiser.stored / denoiser.total)


def _two_in_a_row(blocks: Sequence[int]) -> int:
    """Return the bytes of the running block and the next, which is copied meanwhile."""
    return max(sum(pair) for pair in zip(blocks, [*blocks[1:], 0], strict=True))


PLACES: Mapping[Memory, Callable[[Sequence[DenoiserBytes]], Places]] = {
    "resident": _resident,
    "swap": _swap,
    "lean": _lean,
    "disk": _disk,
}
"""By mode: from the bytes of each denoiser, the noisiest first. The fastest first."""
