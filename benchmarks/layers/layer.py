"""One linear of a pretrained network, and its inputs while that network runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import nn

PARTS = ("fit", "test")


class Layer(NamedTuple):
    """One linear, its calibration inputs and its held-out inputs: (tokens, in)."""

    linear: nn.Linear
    fit: torch.Tensor
    test: torch.Tensor


def texts(part: str) -> list[str]:
    """Return Python's own documentation: every second topic to calibrate on, the others to judge
    on.
    """
    return [text for _, text in sorted(topics.items())][PARTS.index(part) :: len(PARTS)]


@contextmanager
def reading(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep the inputs of the named linears within this context: of each call one tensor, (tokens,
    in).
    """
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kept=seen[name]: kept.append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
