"""Suspension of a memory mode while a method of diffusers changes a model's weights; the mode then
applies again.

Modes hold the tensors that they move. diffusers' own way, to remove accelerate's hooks and to add
those of another kind of offloading, does not know ours.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

PIPELINE_VERBS = (
    "load_lora_weights",
    "unload_lora_weights",
    "delete_adapters",
    "fuse_lora",
    "unfuse_lora",
    "set_lora_device",
)
DENOISER_VERBS = (
    "load_lora_adapter",
    "add_adapter",
    "unload_lora",
    "delete_adapters",
    "fuse_lora",
    "unfuse_lora",
    "dequantize",
    "compile",
    "compile_repeated_blocks",
)


def lift_for(owner: Any, verbs: Iterable[str], lifted: Callable[[], AbstractContextManager[None]]) -> ExitStack:
    """Run methods of one object within `lifted()`. Closing the stack restores its class's own
    methods.
    """
    undo = ExitStack()
    for verb in verbs:
        if not hasattr(owner, verb):  # not every pipeline loads LoRAs
            continue
        setattr(owner, verb, _within(getattr(owner, verb), lifted))
        undo.callback(delattr, owner, verb)
    return undo


def _within(method: Callable[..., Any], lifted: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    @functools.wraps(method)
    def within(*args: Any, **kwargs: Any) -> Any:
        with lifted():
            return method(*args, **kwargs)

    return within
