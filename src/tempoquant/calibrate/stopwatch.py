"""Seconds by stage: where a block's time goes."""

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Adds up the time spent in each stage.

    Attributes:
        seconds: by stage, in the order in which stages were first entered.
        device: a stage ends after this device has finished: a kernel's time belongs to the stage
            that launched it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.device = torch.device("cpu")

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time within this context towards a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
