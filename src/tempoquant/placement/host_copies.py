"""Modules whose weights wait in host memory and are on the device only while they are wanted.

diffusers' group offloading brings blocks of one model in a fixed order. It knows no second model that takes the first
one's place, and takes the text encoder's embedding of gigabytes to the device to read a few rows of it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn


class SideStream:
    """Copies to a CUDA device beside what computes there. On any other device: plain copies, one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, host: torch.Tensor) -> torch.Tensor:
        """A copy on the device, complete once `wait` was called on what `mark` answered after it.

        The memory comes from the computing stream, which may just have given it back; the copy waits until all that
        was asked of that stream before is done.
        """
        if self._stream is None:
            return to_device(host, self.device)
        there = torch.empty_like(host, device=self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            there.copy_(host, non_blocking=True)
        there.record_stream(self._stream)  # or the memory could be given away before the copy is done
        return there

    def mark(self) -> Any:
        """How far the copies have been asked for."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """Have what is computed from now on wait for the copies up to a mark."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor there; itself where it is there already."""
    return host.to(device)


SLAB_BYTES = 2**29
"""PyTorch rounds every page-locked allocation up to a power of two: a tensor of 142 MB alone would take 268 MB."""

_ALIGNMENT = 256  # of a tensor within a slab, bytes


class PinnedSlabs:
    """Page-locked host memory in which tensors lie one after another. A slab is free once none of them is left."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy on the host."""
        start, size = place_in_slab(self._used, self._slab.numel(), tensor.nbytes)
        if size:
            self._slab = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._used = start + tensor.nbytes
        held = self._slab[start : self._used].view(tensor.dtype).view(tensor.shape)
        return held.copy_(tensor)


def place_in_slab(used: int, slab: int, wanted: int) -> tuple[int, int]:
    """Where a tensor of `wanted` bytes goes after `used` of `slab` bytes: (start, 0), or (0, size of a new slab)."""
    start = -(-used // _ALIGNMENT) * _ALIGNMENT
    if start + wanted <= slab:
        return start, 0
    return 0, max(SLAB_BYTES, 1 << max(0, wanted - 1).bit_length())


def slab_bytes(sizes: Iterable[int]) -> int:
    """Page-locked bytes that tensors of these sizes take, in this order."""
    used = slab = total = 0
    for wanted in sizes:
        used, size = place_in_slab(used, slab, wanted)
        slab, total, used = size or slab, total + size, used + wanted
    return total


class HostCopy:
    """Some tensors of a model, with copies that stay in host memory. Taking the copies takes them off the device.

    Args:
        tensors: parameters and buffers.
        slabs: of page-locked memory for the copies; None for plain memory.

    Attributes:
        is_here: whether the tensors are on the device, or on their way.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], stream: SideStream, slabs: PinnedSlabs | None = None) -> None:
        self._stream, self._slabs, self._mark = stream, slabs, None
        self._tensors = [(tensor, self._take(tensor)) for tensor in tensors]
        self.is_here = False

    def bring(self) -> None:
        """Ask for the tensors on the device. They may be used after `wait`."""
        if self.is_here:
            return
        self.is_here = True
        for tensor, host in self._tensors:
            tensor.data = self._stream.copy(host)
        self._mark = self._stream.mark()

    def wait(self) -> None:
        """Have computations wait for the tensors; bring them if nobody did."""
        self.bring()
        self._stream.wait(self._mark)

    def leave(self) -> None:
        """Give the memory on the device back."""
        for tensor, host in self._tensors:
            tensor.data = host
        self._mark, self.is_here = None, False

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        host = tensor.data.cpu() if self._slabs is None else self._slabs.hold(tensor.data)
        tensor.data = host  # at once: no more than one tensor is in memory twice
        return host


def tensors_of(*modules: nn.Module) -> dict[int, torch.Tensor]:
    """Parameters and buffers by identity, tied ones once."""
    return {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}


def stream_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], stays: nn.Parameter, stream: SideStream
) -> Callable[[], None]:
    """Have a model compute on the device with one of its blocks there at a time, and what is in no block.

    Args:
        model: its tensors come to the host.
        blocks: run one after another.
        stays: the weight of an embedding; its rows are looked up in host memory.

    Returns:
        What undoes it, and leaves the model on the host.
    """
    device, host = stream.device, torch.device("cpu")
    stays.data = stays.data.to(host)
    apart = {*tensors_of(*blocks), id(stays)}
    rest = HostCopy([t for key, t in tensors_of(model).items() if key not in apart], stream)
    copies = [HostCopy(tensors_of(block).values(), stream) for block in blocks]
    handles = [
        model.register_forward_pre_hook(lambda _, args, kwargs: _moved((args, kwargs), device), with_kwargs=True)
    ]
    for module in model.modules():  # several may share the weight
        if any(parameter is stays for parameter in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(lambda _, args: _moved(args, host)))
            handles.append(module.register_forward_hook(lambda _module, _args, output: output.to(device)))
    for module, copy in zip((model, *blocks), (rest, *copies), strict=True):
        handles.append(module.register_forward_pre_hook(lambda *_, copy=copy: copy.wait()))
        handles.append(module.register_forward_hook(lambda *_, copy=copy: copy.leave(), always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for copy in (rest, *copies):
            copy.leave()

    return undo


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors of a nested tuple or dict on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
