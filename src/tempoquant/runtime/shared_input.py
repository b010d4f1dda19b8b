"""SharedInput: linears that read one input have it quantized once.

q, k and v of an attention are called one after the other with the same tensor. The first one
quantizes it, the others take the result, and the last one releases it, so that it takes no memory
while attention runs. Threads that run one model share nothing.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from tempoquant.kernels.quantized_input import QuantizedInput


class SharedInput(threading.local):
    """The latest input of linears that read one input, quantized, in this thread. A copy, pickled
    or not, is empty.

    Attributes:
        num_linears: how many share it.
    """

    def __init__(self, num_linears: int) -> None:  # runs again in every thread
        self.num_linears = num_linears
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.num_linears,)

    def forget(self) -> None:
        """Release the input and its quantized form."""
        self._x: torch.Tensor | None = None
        self._quantized: tuple[QuantizedInput, ...] | None = None
        self._version, self._num_waiting, self._backend = 0, 0, ""

    def quantized(
        self,
        x: torch.Tensor,
        quantize: Callable[[torch.Tensor], tuple[QuantizedInput, ...]],
        backend: str = "",
        is_in_call: bool = False,
    ) -> tuple[QuantizedInput, ...]:
        """Return `quantize(x)`, or the result of the linear before, if x is the same tensor and
        unchanged, and the backend is the same.

        Linears of MXFP4 that share an input may differ in backend, since FP8 does not hold every
        weight. Neither a graph that is being compiled nor `torch.inference_mode` can tell whether x
        changed. Within a call of the model (`is_in_call`) the same tensor then counts as unchanged,
        which holds for every attention of diffusers; outside of one, in inference mode, x is
        quantized again.
        """
        version = 0
        if not torch.compiler.is_compiling():
            if not torch.is_inference(x):
                version = x._version
            elif not is_in_call:
                return quantize(x)
        if self._quantized is None or self._x is not x or self._version != version or self._backend != backend:
            self._x, self._version, self._backend, self._quantized = x, version, backend, quantize(x)
            self._num_waiting = self.num_linears
        result = self._quantized
        self._num_waiting -= 1
        if self._num_waiting == 0:
            self.forget()
        return result
