"""Training through a 4-bit layer, as a LoRA on top of it needs. The value is the 4-bit one, bit for bit, by the kernels
of inference; the gradient is that of the dequantized layer (`kernels.input_gradient`).

Autograd by itself would give the gradient of whatever the forward pass happens to be made of: in plain PyTorch that of
the branch alone, for rounding has none, and with kernels nothing at all.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from tempoquant.errors import UnsupportedError
from tempoquant.formats import get_format
from tempoquant.kernels.input_gradient import input_gradient
from tempoquant.kernels.reference import LinearTensors

_Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def straight_through(forward: _Forward) -> _Forward:
    """Give `forward(self, x)` of a QuantizedLinear the gradient of its dequantized layer.

    It raises UnsupportedError while gradients are recorded and one of the layer's own tensors asks for one.
    """

    @functools.wraps(forward)
    def with_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(self, x)
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.requires_grad:
                raise UnsupportedError(
                    f"{name} of a 4-bit layer asks for a gradient and cannot be trained: leave requires_grad False and "
                    'train a LoRA on top, with bias="none".'
                )
        if not x.requires_grad:
            return forward(self, x)
        read = self._tensors()._replace(input_offset=None, bias=None)
        return _StraightThrough.apply(x, functools.partial(forward, self), self.entry.format.name, *read)

    return with_gradient


class _StraightThrough(torch.autograd.Function):
    """x ↦ forward(x), whose backward pass reads the layer's stored tensors and nothing of what was computed."""

    @staticmethod
    def forward(x: torch.Tensor, forward: Any, format: str, *tensors: Any) -> torch.Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, _, ctx.format, *tensors, ctx.rotated = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "the gradient through a 4-bit layer is an estimate and has no gradient of its own: call backward or "
                "torch.autograd.grad with create_graph=False."
            )
        tensors = LinearTensors._make((*ctx.saved_tensors, ctx.rotated))
        grad_x = input_gradient(grad_y, tensors, get_format(ctx.format))
        return grad_x, *[None] * (2 + len(tensors))
