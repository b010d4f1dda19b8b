"""A Triton kernel's launch as a value: what runs and what is compiled ahead of time, without a GPU, are then the same.

A kernel module offers `specializations()`: the launches that the shapes of Wan need, each under a name, made from
tensors on the device "meta" by the very function that makes the launch of a run.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch

NATIVE_FP8 = 89  # the compute capability, ten times the major plus the minor, from which on FP8 converts in hardware


_Tensor = TypeVar("_Tensor", torch.Tensor, torch.Tensor | None)


def with_rows(matrix: _Tensor) -> _Tensor:
    """The matrix itself where the elements of each row lie side by side in memory, wherever rows lie; else a copy.

    Kernels take a stride between rows, and none within them.
    """
    return matrix if matrix is None or matrix.stride(-1) == 1 else matrix.contiguous()


def dense(tensor: _Tensor) -> _Tensor:
    """The tensor itself where it lies without gaps and in order, for kernels that take no stride of it; else a copy."""
    return None if tensor is None else tensor.contiguous()


class Launch(NamedTuple):
    """One launch of a kernel.

    kernel: the function that `triton.jit` made. grid: how many programs. arguments: every parameter by its name:
    tensors, tensor descriptors, None, numbers, and what the kernel takes as `tl.constexpr`. options: num_warps,
    num_stages and other options of the compiler. min_capability, max_capability: the least and the largest compute
    capability that it is made for, 80 for 8.0.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    min_capability: int = 80
    max_capability: int = 999

    def run(self) -> None:
        """Launch on the device of the tensors; does nothing when there is nothing to do."""
        if 0 in self.grid:
            return
        first = next(argument for argument in self.arguments.values() if isinstance(argument, torch.Tensor))
        with torch.cuda.device_of(first):
            self.kernel[self.grid](**self.arguments, **self.options)


NamedLaunches = Iterator[tuple[str, Launch]]
