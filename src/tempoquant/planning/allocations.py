"""Allocations of a computation, measured on the meta device, where tensors have shapes but no
memory.

Every operation of the real modules runs, so the result follows the code and the shapes that they
are given.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(compute: Callable[[], Any]) -> int:
    """Return the most bytes of tensors alive at once that `compute` allocated, on any device.

    A storage counts in full from the operation that made it until nothing refers to it. Workspaces
    of libraries, fragmentation and the CUDA context are not included.
    """
    tensors = LiveBytes()
    with torch.no_grad(), tensors, _AsOneKernel():
        compute()
    return tensors.peak


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations within this context make, without those of their inputs.

    Attributes:
        live: bytes alive now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()  # a storage's Python object lives as long as the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._meet(tensor, tensor.untyped_storage().nbytes())
        return result

    def _meet(self, tensor: torch.Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, num_bytes).atexit = False

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


class _AsOneKernel(TorchFunctionMode):
    """Lets attention and RMS norms allocate only their output, like their fused GPU kernels; on
    meta they are decomposed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            return torch.empty_like(query.transpose(1, 2)).transpose(1, 2)  # tokens before heads, as flash answers
        if func is functional.rms_norm:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
