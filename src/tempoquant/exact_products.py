"""Float32 products that stay in float32, whatever matmul precision the user allows elsewhere.

`torch.set_float32_matmul_precision` and `allow_tf32` let libraries round float32 operands to 11 or
8 significant bits. A product that *defines* a result must not depend on them.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x · weightᵀ + bias, products and sums in the operands' dtype, which is float32 or
    float64.

    Args:
        x: (…, in). weight: (out, in). bias: (out,), or None.

    Returns:
        (…, out). A compiled graph has it as one operator.
    """
    if torch.compiler.is_compiling():
        return _exact_linear(x, weight, bias)
    with _full_precision():
        return functional.linear(x, weight, bias)


@torch.library.custom_op("tempoquant::exact_linear", mutates_args=())
def _exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with _full_precision():
        return functional.linear(x, weight, bias)


@_exact_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _Switches:
    """Switches for PyTorch's float32 matmul precision; they are off while any thread is inside.

    The switches belong to the whole process. So the first thread that enters remembers the user's
    settings, and the last one that leaves restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before: list[tuple[Any, str, Any]] = []

    def enter(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._before = [(owner, name, getattr(owner, name)) for owner, name, _ in _SWITCHES]
                for owner, name, exact in _SWITCHES:
                    setattr(owner, name, exact)
            self._num_inside += 1

    def leave(self) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                for owner, name, value in self._before:
                    setattr(owner, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, value for full precision) of each switch, under PyTorch 2.9's names
    where it has them.
    """
    cuda = torch.backends.cuda.matmul
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return [(cuda, "allow_tf32", False)]
    return [(owner, "fp32_precision", "ieee") for owner in (cuda, torch.backends.mkldnn.matmul)]


_SWITCHES = _switches()
_SWITCHED = _Switches()


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    _SWITCHED.enter()
    try:
        yield
    finally:
        _SWITCHED.leave()
