"""Compilation of denoisers' blocks, one by one: diffusers' regional compilation, beneath the hooks
of caches.

diffusers' `compile_repeated_blocks` compiles a block together with its hooks, and the hooks of its
caches forbid that: the whole block would run uncompiled. Here a block's own forward is compiled,
and hooks call it.
"""

import functools
from contextlib import ExitStack
from typing import Any

import torch

from tempoquant.errors import UnsupportedError
from tempoquant.models.families import PipelineFacts


def compile_blocks(pipeline: Any, facts: PipelineFacts, backend: str = "inductor") -> ExitStack:
    """Compile the blocks that diffusers lists as repeated, once for each class. Closing the stack
    undoes it.

    Args:
        backend: of torch.compile.

    Raises:
        UnsupportedError: diffusers lists none, or something else has replaced a block's forward.
    """
    undo = ExitStack()
    compiled: dict[type, Any] = {}
    for denoiser in facts.denoisers:
        model = getattr(pipeline, denoiser.component)
        repeated = getattr(model, "_repeated_blocks", None) or ()
        blocks = [module for module in model.modules() if type(module).__name__ in repeated]
        if not blocks:
            raise UnsupportedError(f"diffusers compiles no blocks of a {type(model).__name__}: leave --compile out.")
        if any("forward" in block.__dict__ for block in blocks):
            raise UnsupportedError(
                f"the blocks of {denoiser.name} compute in chunks of tokens, or a cache or an offloading hook is on "
                "them: compile before caches, and without --memory lean and chunks."
            )
        for block in blocks:
            kind = type(block)
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward, backend=backend)
            block.forward = functools.partial(compiled[kind], block)
            undo.callback(block.__dict__.pop, "forward", None)
    return undo
