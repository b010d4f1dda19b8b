"""The number of threads that a model computes on without a GPU."""

import contextlib
import os
from collections.abc import Iterator

import torch

from tempoquant.models.source import SourceModel

SMALL_WIDTH = 1024
"""Below this width a product takes microseconds, less than two threads take to share it on a busy
machine.
"""


@contextlib.contextmanager
def suited_threads(source: SourceModel, device: str) -> Iterator[None]:
    """Let a small model compute on one thread within this context; a large one, or one on a GPU, on
    as many as before.

    One thread sums in one order, so a small model's results do not depend on the number of cores. A
    user's OMP_NUM_THREADS takes precedence.

    Args:
        source: the pipeline.
        device: its compute device.
    """
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu" and "OMP_NUM_THREADS" not in os.environ and source.width < SMALL_WIDTH:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
