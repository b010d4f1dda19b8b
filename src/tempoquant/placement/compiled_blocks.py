"""Memory modes beside `compile_repeated_blocks`: the moves of a block's weights act around its
compiled call.

A module's hooks are compiled with it, and streams and events have no place in a graph. So for a
compiled block, the hooks are put around the function that it calls instead.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from tempoquant.errors import UnsupportedError
from tempoquant.placement.modes import Memory


def around_calls(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> Callable[[], None]:
    """Run `before()` before each call of a module and `after()` after each that did not fail.

    Args:
        before, after: as `models.hooks.unobtrusive` marks them; they ignore their arguments.

    Returns:
        A function that undoes it.
    """
    compiled = module._compiled_call_impl
    if compiled is None:
        handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    def call(*args: Any, **kwargs: Any) -> Any:
        before()
        result = compiled(*args, **kwargs)
        after()
        return result

    module._compiled_call_impl = call

    def undo() -> None:
        if module._compiled_call_impl is call:  # it was compiled anew, or not at all
            module._compiled_call_impl = compiled

    return undo


def refuse_compiled(mode: Memory, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Raise UnsupportedError if a mode would have to move weights inside compiled code."""
    whole = model._compiled_call_impl is not None
    is_compiled = whole or any(block._compiled_call_impl is not None for block in blocks)
    if mode == "disk" and is_compiled:
        raise UnsupportedError(
            "the memory mode disk and compiled blocks do not go together: a block's weights are read before its call, "
            'and are other tensors each time. Choose "resident" or "swap", or do not compile.'
        )
    if mode == "lean" and is_compiled:
        raise UnsupportedError(
            "the memory mode lean and compiled blocks do not go together: diffusers' group offloading moves weights "
            'within a block\'s call. Choose "resident" or "swap", or do not compile.'
        )
    if mode == "swap" and whole:
        raise UnsupportedError(
            "the memory mode swap and a model compiled as a whole do not go together: blocks come and go within its "
            "call. Compile its blocks instead: compile_repeated_blocks()."
        )
