"""ComfyLinear: a QuantizedLinear as ComfyUI's ModelPatcher expects a linear to be.

ComfyUI moves, streams and changes a module by attributes that its own operations have (`CastWeightBiasOp` of its
comfy/ops.py). `comfy_cast_weights` says that the tensors stay where they are, and are to be brought to the input for
each call; `weight_function` and `bias_function` hold what is to be done to weight and bias. A 4-bit weight cannot be
changed, so what lies there is added to the output instead: `adapters.Addition`.
"""

import copy
from typing import Any

import torch
from torch import nn

from tempoquant.errors import UnsupportedError
from tempoquant.hosts.comfyui.adapters import Addition
from tempoquant.runtime.linear import QuantizedLinear


class ComfyLinear(QuantizedLinear):
    """One 4-bit linear inside ComfyUI's model.

    Attributes:
        comfy_cast_weights: whether its tensors may lie on another device than the input (ComfyUI sets it).
        weight_function, bias_function: what is added to the output (ComfyUI sets them from the patcher's).
    """

    comfy_cast_weights = False
    weight_function: list[Any] = []  # noqa: RUF012 (ComfyUI replaces the list of an instance, and never changes this one)
    bias_function: list[Any] = []  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, …, in) to (batch, …, out), in the dtype of x, additions included."""
        linear = self.on(x.device) if self.comfy_cast_weights else self
        y = QuantizedLinear.forward(linear, x)
        for addition in (*self.weight_function, *self.bias_function):
            if not isinstance(addition, Addition):
                raise UnsupportedError(
                    f"{type(addition).__name__} would change the weight of a 4-bit layer, which cannot be changed: "
                    "only plain LoRAs can be added."
                )
            y = addition.added(y, x)
        return y

    def on(self, device: torch.device) -> "ComfyLinear":
        """Return this layer with its tensors on a device, for one call: itself where they are there already."""
        if self.packed.device == device:
            return self
        twin = copy.copy(self)  # clock, shared input and what was looked up are the same objects
        twin._parameters = {key: None if tensor is None else _moved(tensor, device)
                            for key, tensor in self._parameters.items()}  # fmt: skip
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # ComfyUI lists what LoRAs may change by the names of weights. An empty one has no size, which is the truth.
        destination[f"{prefix}weight"] = torch.empty(0)


def _moved(tensor: torch.Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device, non_blocking=device.type == "cuda"), requires_grad=False)
