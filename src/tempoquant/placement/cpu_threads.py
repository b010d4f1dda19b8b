"""How many threads a model computes on without a GPU."""

import contextlib
import os
from collections.abc import Iterator

import torch

from tempoquant.models.source import SourceModel

SMALL_WIDTH = 1024
"""Below it a product takes microseconds, less than two threads take to share it while other work has a core."""


@contextlib.contextmanager
def suited_threads(source: SourceModel, device: str) -> Iterator[None]:
    """Within this context a small model computes on one thread; a large one, or one on a GPU, on as many as before.

    One thread sums in one order, so a small model's results do not depend on how many cores a machine has. Whoever
    sets OMP_NUM_THREADS has chosen, and nothing changes.

    Args:
        source: the pipeline.
        device: where it computes.
    """
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu" and "OMP_NUM_THREADS" not in os.environ and source.width < SMALL_WIDTH:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
