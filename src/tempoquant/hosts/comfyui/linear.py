"""ComfyLinear: a QuantizedLinear with the interface that ComfyUI's ModelPatcher expects of a
linear.

ComfyUI moves, streams and changes a module by the attributes of its own operations
(`CastWeightBiasOp` of its comfy/ops.py). `comfy_cast_weights` means that the tensors stay where
they are, and each call brings them to the input. `weight_function` and `bias_function` hold changes
of weight and bias. A 4-bit weight cannot be changed, so these changes are added to the output
instead: `adapters.Addition`.
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
        comfy_cast_weights: whether its tensors may lie on another device than the input (ComfyUI
            sets it).
        weight_function, bias_function: additions to the output (ComfyUI sets them from the
            patcher's).
    """

    comfy_cast_weights = False
    weight_function: list[Any] = []  # noqa: RUF012 (ComfyUI replaces the list of an instance, and never changes this one)
    bias_function: list[Any] = []  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (batch, …, in) to (batch, …, out), in the dtype of x, additions included."""
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
        """Return this layer with its tensors on a device, for one call; the layer itself if they
        are there already.
        """
        if self.packed.device == device:
            return self
        twin = copy.copy(self)  # clock, shared input and looked-up facts are the same objects
        twin._parameters = {
            key: None if tensor is None else _moved(tensor, device) for key, tensor in self._parameters.items()
        }
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # ComfyUI lists the weights that LoRAs may change by name. An empty one truly has no size.
        destination[f"{prefix}weight"] = torch.empty(0)


def _moved(tensor: torch.Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(device, non_blocking=device.type == "cuda"), requires_grad=False)
