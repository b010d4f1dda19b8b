"""Text encoders that transformers quantized, block by block through the device.

Their tensors are more than their numbers: torchao's are objects of several tensors, and beside
those of bitsandbytes lies a state that tells how to read them. So it is modules that move, by their
own `to`, and not tensors. No copy stays on the host: a block is copied back after each call, where
`host_copies` drops what is on the device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tempoquant.placement.host_copies import SideStream, moved


def stream_quantized_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], stays: nn.Parameter, stream: SideStream
) -> Callable[[], None]:
    """Have a model compute on the device with one of its blocks there at a time, and what is in no
    block.

    Args, and what is returned: as of `host_copies.stream_blocks`.
    """
    device, host = stream.device, torch.device("cpu")
    apart = {module for block in blocks for module in block.modules()}
    rest = [each for each in _with_tensors(model) if each not in apart and not _holds(each, stays)]
    holders = [module for module in model.modules() if _holds(module, stays)]
    handles: list[Any] = [
        model.register_forward_pre_hook(lambda _, args, kwargs: moved((args, kwargs), device), with_kwargs=True)
    ]
    for module in holders:
        handles.append(module.register_forward_pre_hook(lambda _, args: moved(args, host)))
        handles.append(module.register_forward_hook(lambda _module, _args, output: output.to(device)))
    for module, parts in ((model, rest), *((block, [block]) for block in blocks)):
        handles.append(module.register_forward_pre_hook(lambda *_, parts=parts: move(parts, device)))
        handles.append(module.register_forward_hook(lambda *_, parts=parts: move(parts, host), always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        move([*rest, *blocks], host)

    move([*holders, *rest, *blocks], host)
    return undo


def move(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Take modules to a device."""
    for module in modules:
        module.to(device)


def _with_tensors(model: nn.Module) -> Iterator[nn.Module]:
    """Return modules without submodules that hold a tensor."""
    for module in model.modules():
        if not list(module.children()) and [*module.parameters(), *module.buffers()]:
            yield module


def _holds(module: nn.Module, weight: nn.Parameter) -> bool:
    return any(parameter is weight for parameter in module.parameters(recurse=False))
