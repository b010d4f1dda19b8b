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
        read_ahead: in other RAM while generating: of blocks that are read before they run.
        copied_first: to the device before the first step, with nothing to run beside it.
        copied_between: to the device during the last call of the denoiser before, for each but the
            first.
        copied_each_call: to the device during each call of each denoiser.
        holds_all: whether RAM holds all denoisers at once, as they load or as they wait.
        from_disk: whether what is copied is read from files, and not from RAM.
    """

    away: int
    running: Sequence[int]
    changing: Sequence[int]
    pinned: int
    copied_first: int
    copied_between: Sequence[int]
    copied_each_call: Sequence[int]
    read_ahead: int = 0
    holds_all: bool = True
    from_disk: bool = False


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
    """Count one block; what lies in no block stays until another denoiser runs."""
    running = [denoiser.rest + max(denoiser.blocks) for denoiser in denoisers]
    return Places(
        away=max(denoiser.rest for denoiser in denoisers),
        running=running,
        changing=[max(pair) for pair in itertools.pairwise(running)],
        pinned=0,
        copied_first=0,
        copied_between=[0] * (len(denoisers) - 1),
        copied_each_call=[denoiser.total for denoiser in denoisers],
        read_ahead=2 * max(block for denoiser in denoisers for block in denoiser.blocks),
        holds_all=False,
        from_disk=True,
    )


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
