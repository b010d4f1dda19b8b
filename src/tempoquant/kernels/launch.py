"""A Triton kernel's launch as a value: runs and ahead-of-time compilation, without a GPU, then
share it.

A kernel module offers `specializations()`: the launches for the shapes of Wan, each under a name,
made from tensors on the device "meta" by the same function that makes the launch of a run.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import JITFunction

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4 has none
    TensorDescriptor = None

NATIVE_FP4 = 100  # the compute capability of the first GPUs that multiply FP4
NATIVE_FP8 = 89  # the compute capability, ten times the major plus the minor, from which FP8 converts in hardware


_Tensor = TypeVar("_Tensor", torch.Tensor, torch.Tensor | None)


def with_rows(matrix: _Tensor) -> _Tensor:
    """Return the matrix itself if the elements of each row are contiguous, wherever rows lie; else
    a copy.

    Kernels take a stride between rows, and none within them.
    """
    return matrix if matrix is None or matrix.stride(-1) == 1 else matrix.contiguous()


def dense(tensor: _Tensor) -> _Tensor:
    """Return the tensor itself if it is contiguous, for kernels that take no stride of it; else a
    copy.
    """
    return None if tensor is None else tensor.contiguous()


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: the function that `triton.jit` made.
        grid: the number of programs.
        arguments: every parameter by its name: tensors, tensor descriptors, None, numbers, and
            `tl.constexpr` values.
        options: num_warps, num_stages and other options of the compiler.
        min_capability, max_capability: the least and the largest compute capability that it is made
            for, 80 for 8.0.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    min_capability: int = 80
    max_capability: int = 999

    def run(self) -> None:
        """Launch on the device of the tensors; do nothing for an empty grid."""
        if 0 in self.grid:
            return
        first = next(argument for argument in self.arguments.values() if isinstance(argument, torch.Tensor))
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(first):
                self._run_here()
        else:
            self._run_here()

    def _run_here(self) -> None:
        """Launch on the current device, by the compiled kernel that the last launch like this one
        found.

        Triton looks up each launch's kernel by a list and a text of all arguments. Launches differ
        there by types, numbers, and whether 16 divides an address: `_likeness`.
        """
        note = _this_thread.note
        if isinstance(self.kernel, JITFunction) and not is_observed():
            compiled = self._run_compiled()
        else:
            compiled = None
            with contextlib.nullcontext() if note is None else _disable_current_modes():  # the interpreter copies
                self.kernel[self.grid](**self.arguments, **self.options)
        if note is not None:
            note(self, compiled)

    def _run_compiled(self) -> "Compiled":
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (
            self.kernel.fn, driver, device, *self.options.values(),
            *[(argument.dtype, argument.data_ptr() % 16) if isinstance(argument, torch.Tensor) else _likeness(argument)
              for argument in self.arguments.values()],
        )  # fmt: skip
        found = _COMPILED.get(key)
        if found is None:
            if len(_COMPILED) >= _MOST_COMPILED:
                _COMPILED.clear()
            kernel = self.kernel[self.grid](**self.arguments, **self.options)
            names = tuple(self.kernel.arg_names)
            found = _COMPILED[key] = Compiled(kernel.run, kernel.function, kernel.packed_metadata, names)
            return found
        arguments = self.arguments
        grid = (*self.grid, 1, 1)
        stream = driver.get_current_stream(device)
        found.run(grid[0], grid[1], grid[2], stream, found.function, found.metadata, None, None, None,
                  *[arguments[name] for name in found.names])  # fmt: skip
        return found


class Compiled(NamedTuple):
    """A compiled kernel: its launcher, function and metadata as Triton has them, and the order of
    its arguments.
    """

    run: Any
    function: Any
    metadata: Any
    names: tuple[str, ...]


class _ThisThread(threading.local):
    note: "Callable[[Launch, Compiled | None], None] | None" = None


_this_thread = _ThisThread()


@contextlib.contextmanager
def noting(note: "Callable[[Launch, Compiled | None], None]") -> Iterator[None]:
    """Call `note` with each launch of this thread, after it, and with the kernel that it ran,
    within this context.

    The kernel is None where Triton's interpreter ran it, or a profiler heard of it.
    """
    before, _this_thread.note = _this_thread.note, note
    try:
        yield
    finally:
        _this_thread.note = before


_MOST_COMPILED = 4096
_COMPILED: dict[Any, Compiled] = {}
"""What to launch, for launches of every kind so far."""


def _likeness(argument: Any) -> Any:
    """Return the part of an argument that decides which compiled kernel takes it; finer than
    Triton's own distinctions.
    """
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is TensorDescriptor:
        return argument.base.dtype, tuple(argument.block_shape)
    return argument


def is_observed() -> bool:
    """Return whether a profiler wants to hear of each launch, or Triton's launchers are unknown to
    us.
    """
    runtime: Any = getattr(getattr(triton, "knobs", None), "runtime", None)
    chains: list[Any] = [getattr(runtime, name, None) for name in ("launch_enter_hook", "launch_exit_hook")]
    return not all(isinstance(getattr(chain, "calls", None), list) and not chain.calls for chain in chains)


NamedLaunches = Iterator[tuple[str, Launch]]
