"""A memory mode is lifted while a verb of diffusers changes which weights a model has, and is then in force again.

Modes hold on to the tensors that they move. diffusers' own answer, to take accelerate's hooks off and to put those of
another kind of offloading on, knows nothing of ours.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

PIPELINE_VERBS = (
    "load_lora_weights", "unload_lora_weights", "delete_adapters", "fuse_lora", "unfuse_lora", "set_lora_device",
)  # fmt: skip
DENOISER_VERBS = (
    "load_lora_adapter", "add_adapter", "unload_lora", "delete_adapters", "fuse_lora", "unfuse_lora", "dequantize",
    "compile", "compile_repeated_blocks",
)  # fmt: skip


def lift_for(owner: Any, verbs: Iterable[str], lifted: Callable[[], AbstractContextManager[None]]) -> ExitStack:
    """Have methods of one object run within `lifted()`. Closing the stack gives its class's own methods back."""
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
