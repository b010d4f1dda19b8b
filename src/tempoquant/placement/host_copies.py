"""Modules whose weights wait in host memory and are on the device only while they are needed.

diffusers' group offloading brings blocks of one model in a fixed order. It has no second model that
takes the first one's place, and it copies the text encoder's embedding of gigabytes to the device
to read a few rows of it.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn


class SideStream:
    """Copies to a CUDA device in parallel with its computation. On any other device no tensor
    moves.

    There are two queues of work, for copies and for computation, and marks in them: an event
    recorded in one that the other waits for. There is no host synchronization.

    Attributes:
        device: the compute device.
        moves: whether tensors have to be copied there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.moves = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.moves else None

    def reserve(self, num_bytes: int) -> torch.Tensor:
        """Allocate memory on the device, (num_bytes,) uint8, in the computing queue: it may be
        written to after `computed`.
        """
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def computed(self) -> Any:
        """Return a mark of the computation queued so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Any:
        """Copy (host, device) tensors once computation has reached a mark; return the mark of their
        end.
        """
        assert self._stream is not None  # otherwise nothing moves
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for host, there in pairs:
                there.copy_(host, non_blocking=True)
        return self._stream.record_event()

    def wait(self, mark: Any) -> None:
        """Make later computation wait for the copies up to a mark."""
        torch.cuda.current_stream(self.device).wait_event(mark)


class Slot:
    """A place on the device that holds one part of a model after another, in the same memory.

    `tensor.record_stream` would let the allocator free memory only once it has *found* that a copy
    is done, so that two parts need memory at once. Here memory stays, and marks tell when it may be
    written to: never before the computation with its last part has ended.

    Args:
        stream: copies to the device.
    """

    def __init__(self, stream: SideStream) -> None:
        self._stream = stream
        self._num_bytes = 0
        self._memory: torch.Tensor | None = None
        self._held_by: HostCopy | None = None
        self._is_free: Any = None  # the mark after which it may be written to
        self._is_filled: Any = None  # the mark of its last copy

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its largest part."""
        return self._num_bytes

    def make_room(self, num_bytes: int) -> None:
        """Enlarge the slot, from its next allocation on."""
        self._num_bytes = max(self._num_bytes, num_bytes)

    def fill(self, part: "HostCopy", hosts: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        """Queue the copy of a part; return its tensors on the device, and the mark after which they
        may be read.
        """
        if self._held_by is not None:
            raise RuntimeError("a slot was to be filled while another part of a model is in it.")
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode cannot be written to later
            if self._memory is None:
                self._memory = self._stream.reserve(self._num_bytes)
                self._is_free = self._stream.computed()
            places = [self._memory[start : start + host.nbytes].view(host.dtype).view(host.shape)
                      for start, host in zip(starts_of(hosts), hosts, strict=True)]  # fmt: skip
            self._is_filled = self._stream.copy(list(zip(hosts, places, strict=True)), self._is_free)
        self._held_by = part
        return places, self._is_filled

    def empty(self, part: "HostCopy") -> None:
        """Mark the queued computation with the part as its last; its memory may be overwritten
        after that.
        """
        if self._held_by is part:
            self._held_by, self._is_free = None, self._stream.computed()

    def give_back(self) -> None:
        """Free the memory, unless a part is there."""
        if self._held_by is None and self._memory is not None:
            self._stream.wait(self._is_filled)  # a copy without a reader must not write to another's memory
            self._memory = None


def starts_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return the byte offsets at which tensors begin that are stored one after another."""
    return _starts([tensor.nbytes for tensor in tensors])[:-1]


def slot_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes that tensors of these sizes take in a slot."""
    return _starts(list(sizes))[-1]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Return the start of each, and the end of the last one."""
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    return [0, *itertools.accumulate(padded)]


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device; itself if it is there already."""
    return host.to(device)


SLAB_BYTES = 2**29
"""PyTorch rounds every page-locked allocation up to a power of two: a tensor of 142 MB alone would
take 268 MB.
"""

_ALIGNMENT = 256  # of a tensor within a slab, bytes


class PinnedSlabs:
    """Page-locked host memory for tensors one after another. A slab is free once none of them is
    left.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a page-locked copy on the host."""
        start, size = place_in_slab(self._used, self._slab.numel(), tensor.nbytes)
        if size:
            self._slab = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._used = start + tensor.nbytes
        held = self._slab[start : self._used].view(tensor.dtype).view(tensor.shape)
        return held.copy_(tensor)


def place_in_slab(used: int, slab: int, wanted: int) -> tuple[int, int]:
    """Return the place of `wanted` bytes after `used` of `slab` bytes: (start, 0), or (0, size of a
    new slab).
    """
    start = -(-used // _ALIGNMENT) * _ALIGNMENT
    if start + wanted <= slab:
        return start, 0
    return 0, max(SLAB_BYTES, 1 << max(0, wanted - 1).bit_length())


def slab_bytes(sizes: Iterable[int]) -> int:
    """Return the page-locked bytes that tensors of these sizes take, in this order."""
    used = slab = total = 0
    for wanted in sizes:
        used, size = place_in_slab(used, slab, wanted)
        slab, total, used = size or slab, total + size, used + wanted
    return total


class HostCopy:
    """Some tensors of a model, with copies that stay in host memory. Making the copies moves the
    tensors off the device.

    Args:
        tensors: parameters and buffers.
        stream: copies to the device.
        slot: their place on the device; parts that are never there at once may share it.
        slabs: of page-locked memory for the copies; None for plain memory.

    Attributes:
        is_here: whether the tensors are on the device, or on their way.
    """

    def __init__(
        self, tensors: Iterable[torch.Tensor], stream: SideStream, slot: Slot, slabs: PinnedSlabs | None = None
    ) -> None:
        self._stream, self._slot, self._slabs, self._mark = stream, slot, slabs, None
        self._tensors = [(tensor, self._take(tensor)) for tensor in tensors]
        slot.make_room(slot_bytes(host.nbytes for _, host in self._tensors))
        self.is_here = False

    def bring(self) -> None:
        """Queue the copy of the tensors to the device. They may be used after `wait`."""
        if self.is_here:
            return
        hosts = [host for _, host in self._tensors]
        if self._stream.moves:
            there, self._mark = self._slot.fill(self, hosts)
        else:
            there = [to_device(host, self._stream.device) for host in hosts]
        for (tensor, _), place in zip(self._tensors, there, strict=True):
            tensor.data = place
        self.is_here = True

    def wait(self) -> None:
        """Make computation wait for the tensors; bring them if they were not."""
        self.bring()
        if self._mark is not None:
            self._stream.wait(self._mark)

    def leave(self) -> None:
        """Leave the slot to the next part."""
        for tensor, host in self._tensors:
            tensor.data = host
        if self._stream.moves:
            self._slot.empty(self)
        self._mark, self.is_here = None, False

    def give_back(self) -> None:
        """Leave the slot, and free its memory if no other part is in it."""
        self.leave()
        self._slot.give_back()

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        host = tensor.data.cpu() if self._slabs is None else self._slabs.hold(tensor.data)
        tensor.data = host  # at once, so that no more than one tensor is in memory twice
        return host


def tensors_of(*modules: nn.Module) -> dict[int, torch.Tensor]:
    """Return parameters and buffers by identity, tied ones once."""
    return {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}


def stream_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], stays: nn.Parameter, stream: SideStream
) -> Callable[[], None]:
    """Make a model compute on the device with one of its blocks there at a time, and the parts
    outside blocks.

    Args:
        model: its tensors come to the host.
        blocks: run one after another.
        stays: the weight of an embedding; its rows are looked up in host memory.

    Returns:
        A function that undoes it, and leaves the model on the host.
    """
    device, host = stream.device, torch.device("cpu")
    stays.data = stays.data.to(host)
    apart = {*tensors_of(*blocks), id(stays)}
    rest = HostCopy([t for key, t in tensors_of(model).items() if key not in apart], stream, Slot(stream))
    slot = Slot(stream)
    copies = [HostCopy(tensors_of(block).values(), stream, slot) for block in blocks]
    handles = [model.register_forward_pre_hook(lambda _, args, kwargs: moved((args, kwargs), device), with_kwargs=True)]
    for module in model.modules():  # several may share the weight
        if any(parameter is stays for parameter in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(lambda _, args: moved(args, host)))
            handles.append(module.register_forward_hook(lambda _module, _args, output: output.to(device)))
    for module, copy in zip((model, *blocks), (rest, *copies), strict=True):
        handles.append(module.register_forward_pre_hook(lambda *_, copy=copy: copy.wait()))
        handles.append(module.register_forward_hook(lambda *_, copy=copy: copy.leave(), always_call=True))

    def give_back(*_: Any) -> None:
        for copy in (rest, *copies):
            copy.give_back()

    handles.append(model.register_forward_hook(give_back, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        give_back()

    return undo


def moved(value: Any, device: torch.device) -> Any:
    """Return the tensors of a nested tuple or dict on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value
