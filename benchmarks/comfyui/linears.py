"""A linear as ComfyUI computes it, format by format: comfy-kitchen's eager backend, in float32
unless stated.

On a CPU comfy-kitchen has no product of two NVFP4 tensors: their decoded values are multiplied,
which is the same up to the order of sums.
"""

from collections.abc import Callable

import comfy_kitchen
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreNVFP4Layout
from torch import nn
from torch.nn import functional

from tempoquant.formats import INT4, scale_from_bytes
from tempoquant.hosts.comfyui.nvfp4_layout import branch_tensors, layer_tensors
from tempoquant.layer import QuantizedLayer

LAYOUT = "TensorCoreNVFP4Layout"
SVDQUANT_GROUP = 64

Compute = Callable[[torch.Tensor], torch.Tensor]
"""A function from (tokens, in) float32 to (tokens, out) float32, without the bias."""


class ComfyUILinear(nn.Module):
    """A linear that computes by a `Compute`."""

    def __init__(self, compute: Compute, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._compute, self._bias = compute, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (…, in) to (…, out), in the dtype of x."""
        y = self._compute(x.float().flatten(0, -2)).unflatten(0, x.shape[:-1])
        return (y if self._bias is None else y + self._bias.float()).to(x.dtype)


def four_bit_input(x: torch.Tensor) -> torch.Tensor:
    """Round activations as core does on Blackwell: one scale for all tokens, from the call's
    largest magnitude.
    """
    return QuantizedTensor.from_float(x, LAYOUT).dequantize()


def decoded(tensors: dict[str, torch.Tensor], out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Decode the weight of exported tensors by comfy-kitchen in `dtype`: (out, in)."""
    weight = tensors["weight"]
    params = TensorCoreNVFP4Layout.Params(
        scale=tensors["weight_scale_2"],
        block_scale=tensors["weight_scale"],
        orig_dtype=dtype,
        orig_shape=(out_features, 2 * weight.shape[1]),
    )
    return QuantizedTensor(weight, LAYOUT, params).dequantize()


def exported_nvfp4(layer: QuantizedLayer, four_bits: bool, with_branch: bool = True) -> Compute:
    """Return our export's computation: W4A4 with the tensor cores' decoding, or W4A16 with the
    weight decoded in bfloat16, as in core.

    `pre_quant_scale` is rounded to bfloat16, the dtype that core computes in.
    """
    tensors, branch = layer_tensors(layer), branch_tensors(layer)
    weight = decoded(tensors, layer.out_features, torch.float32 if four_bits else torch.bfloat16).float()
    smoothing = tensors.get("pre_quant_scale", torch.ones(layer.in_features)).to(torch.bfloat16).float()

    def compute(x: torch.Tensor) -> torch.Tensor:
        scaled = x * smoothing
        y = functional.linear(four_bit_input(scaled) if four_bits else scaled, weight)
        if branch and with_branch:
            factor = float(branch["alpha"]) / branch["lora_down.weight"].shape[0]
            hidden = functional.linear(x, branch["lora_down.weight"].float())
            y = y + factor * functional.linear(hidden, branch["lora_up.weight"].float())
        return y

    return compute


def nearest_nvfp4(weight: torch.Tensor, four_bits: bool) -> Compute:
    """Round to nearest by comfy-kitchen's own quantizer: (out, in) float32 weight."""
    rounded = QuantizedTensor.from_float(weight, LAYOUT).dequantize()
    return lambda x: functional.linear(four_bit_input(x) if four_bits else x, rounded)


def convrot_w4a4(weight: torch.Tensor, group_size: int) -> Compute:
    """Return comfy-kitchen's rotation and INT4, a scale a row and a token: its quantizer and its
    linear.
    """
    packed, scales = comfy_kitchen.quantize_convrot_w4a4_weight(weight, convrot_groupsize=group_size)
    return lambda x: comfy_kitchen.convrot_w4a4_linear(x, packed, scales, convrot_groupsize=group_size)


def svdquant_w4a4(layer: QuantizedLayer) -> Compute:
    """Return a layer of `nunchaku_int4` in comfy-kitchen's svdquant_w4a4, whose bytes are ours: its
    quantizer, its linear.
    """
    assert layer.format == INT4 and layer.branch is not None and layer.smoothing_factor is not None
    scales = scale_from_bytes(layer.scale, INT4).t().contiguous()
    smoothing, up, down = layer.smoothing_factor.float(), layer.branch.up.float(), layer.branch.down.float()

    def compute(x: torch.Tensor) -> torch.Tensor:
        quantized = comfy_kitchen.quantize_svdquant_w4a4(x, smoothing, down.t().contiguous())
        y = comfy_kitchen.scaled_mm_svdquant_w4a4(
            quantized[0], layer.packed.view(torch.int8), quantized[1], scales, quantized[2], up
        )
        return y[: len(x)]

    return compute
