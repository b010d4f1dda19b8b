"""Two queues of work in the place of CUDA's streams: what is asked for is done later, in any order
that marks allow.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from tempoquant.placement.host_copies import SideStream

GARBAGE = 0x5A
COMPUTE, COPY = 0, 1


class Mark(NamedTuple):
    """After the first `length` pieces of work of a queue."""

    queue: int
    length: int


class Work(NamedTuple):
    """A piece of work, done once every mark is reached."""

    run: Callable[[], object]
    after: tuple[Mark, ...]


class Queues(SideStream):
    """A side stream whose copies, and whose computing, wait in queues.

    Memory that was given back is handed out again at once, as by CUDA's allocator, which knows of
    computing alone.

    Attributes:
        computes_at_once: computing is done as it is asked for, and copies only when computing has
            to wait for them.
        reserved, most: bytes of memory that is held, and the most there were.
    """

    def __init__(self, computes_at_once: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self.moves, self.computes_at_once = True, computes_at_once
        self.reserved = self.most = 0
        self._queues: tuple[list[Work], list[Work]] = ([], [])
        self._done = [0, 0]
        self._free: list[torch.Tensor] = []

    def reserve(self, num_bytes: int) -> torch.Tensor:
        fitting = next((index for index, memory in enumerate(self._free) if len(memory) == num_bytes), None)
        memory = torch.empty(num_bytes, dtype=torch.uint8) if fitting is None else self._free.pop(fitting)
        self.compute(lambda: memory.fill_(GARBAGE))
        self.reserved += num_bytes
        self.most = max(self.most, self.reserved)
        given = memory[:]
        weakref.finalize(given, self._take_back, memory).atexit = False
        return given

    def _take_back(self, memory: torch.Tensor) -> None:
        self.reserved -= len(memory)
        self._free.append(memory)

    def use_free_memory(self) -> None:
        """Compute with all memory that is free: nothing else may write to it meanwhile."""

        def check(memory: torch.Tensor) -> None:
            assert bool((memory == GARBAGE).all()), "a copy wrote to memory that was given back"

        for memory in self._free:
            self.compute(lambda memory=memory: memory.fill_(GARBAGE))
            self.compute(lambda memory=memory: check(memory))

    def computed(self) -> Mark:
        return Mark(COMPUTE, len(self._queues[COMPUTE]))

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Mark) -> Mark:
        for host, there in pairs:  # one by one: other work comes between
            self._queues[COPY].append(Work(lambda host=host, there=there: there.copy_(host), (after,)))
        return Mark(COPY, len(self._queues[COPY]))

    def wait(self, mark: Mark) -> None:
        if self.computes_at_once:
            while not self._is_reached(mark):
                assert self._step(mark.queue)
        self._ask(Work(lambda: None, (mark,)))

    def compute(self, run: Callable[[], object]) -> None:
        """Queue work of the computing queue."""
        self._ask(Work(run, ()))

    def _ask(self, work: Work) -> None:
        self._queues[COMPUTE].append(work)
        if self.computes_at_once:
            assert self._step(COMPUTE)

    def run_all(self, choices: Iterator[bool]) -> None:
        """Do all queued work; if both queues could continue, a choice decides whether the copies
        do.
        """
        while any(self._done[queue] < len(self._queues[queue]) for queue in (COMPUTE, COPY)):
            first = COPY if next(choices) else COMPUTE
            assert self._step(first) or self._step(1 - first), "each queue waits for the other"

    def _step(self, queue: int) -> bool:
        """Do the next piece of work of a queue, if there is one and its marks are reached."""
        done = self._done[queue]
        if done == len(self._queues[queue]) or not all(map(self._is_reached, self._queues[queue][done].after)):
            return False
        self._done[queue] += 1
        self._queues[queue][done].run()
        return True

    def _is_reached(self, mark: Mark) -> bool:
        return self._done[mark.queue] >= mark.length
