"""Observation of each step of a sampling loop, in pipelines that have no callback for it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def watching_steps(schedulers: Iterable[Any], observe: Callable[[Any, torch.Tensor], None]) -> Iterator[None]:
    """Call `observe(timestep, latents after the step)` after each step of these schedulers, within
    this context.
    """
    watched = list(schedulers)
    for scheduler in watched:
        scheduler.step = _observed(scheduler.step, observe)
    try:
        yield
    finally:
        for scheduler in watched:
            del scheduler.step


def _observed(step: Callable[..., Any], observe: Callable[[Any, torch.Tensor], None]) -> Callable[..., Any]:
    def observed(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, *args, **kwargs)
        observe(timestep, result[0])
        return result

    return observed
