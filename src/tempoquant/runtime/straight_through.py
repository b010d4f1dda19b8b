"""Training through a 4-bit layer, which a LoRA on top of it needs.

The value is the 4-bit one, bit for bit, by the kernels of inference; the gradient is that of the
dequantized layer (`kernels.input_gradient`). Plain autograd would follow the forward pass: in
PyTorch it would give the gradient of the branch alone, since rounding has none, and with kernels no
gradient at all.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from tempoquant.errors import UnsupportedError
from tempoquant.formats import get_format
from tempoquant.kernels.input_gradient import GradientTensors, input_gradient

_Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def straight_through(forward: _Forward) -> _Forward:
    """Give `forward(self, x)` of a QuantizedLinear the gradient of its dequantized layer.

    It raises UnsupportedError if gradients are recorded and one of the layer's own tensors requires
    one.
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
        every = [tensor for tensors in self.gradient_tensors(x) for tensor in tensors]
        entry = self.entry
        return _StraightThrough.apply(x, functools.partial(forward, self), entry.format.name, entry.rotated, *every)

    return with_gradient


class _StraightThrough(torch.autograd.Function):
    """The function x ↦ forward(x), whose backward pass reads only the layer's stored tensors.

    They are GradientTensors of the whole batch, or of each of its rows in turn.
    """

    @staticmethod
    def forward(x: torch.Tensor, forward: Any, format: str, rotated: bool, *tensors: Any) -> torch.Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, _, ctx.format, ctx.rotated, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "the gradient through a 4-bit layer is an estimate and has no gradient of its own: call backward or "
                "torch.autograd.grad with create_graph=False."
            )
        size = len(GradientTensors._fields)
        every = ctx.saved_tensors  # read once: checkpointing gives them a single time
        of_rows = [GradientTensors(*every[start : start + size]) for start in range(0, len(every), size)]
        rows = grad_y.split(1) if len(of_rows) > 1 else [grad_y]
        parts = [
            input_gradient(each, tensors, get_format(ctx.format), ctx.rotated)
            for each, tensors in zip(rows, of_rows, strict=True)
        ]
        grad_x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return grad_x, None, None, None, *[None] * len(every)
