"""The gradient of a 4-bit linear with respect to its input, by the straight-through estimate.

    grad_x = grad_y · W     W: what the layer's tensors stand for (`reference.effective_weight`)

Bengio, Léonard and Courville, arXiv 1308.3432: rounding counts as the identity. Of the layer nothing but its stored
tensors is needed, so nothing is kept for the backward pass: W is made anew for the product, in the dtype of grad_y as
a 16-bit model's weight would be, and lives as long as that.
"""

from typing import Any

import torch

from tempoquant.formats import Format, get_format
from tempoquant.kernels.reference import NUMBERS_AT_ONCE, LinearTensors, effective_weight


def input_gradient(grad_y: torch.Tensor, tensors: LinearTensors, format: Format) -> torch.Tensor:
    """The gradient of the dequantized layer.

    Args:
        grad_y: (…, out), any float dtype.

    Returns:
        (…, in) in the dtype of grad_y.
    """
    return _input_gradient(
        grad_y, tensors.packed, tensors.scale, tensors.tensor_scale, tensors.smoothing_factor, tensors.up,
        tensors.down, tensors.deflation, tensors.rotated, format.name,
    )  # fmt: skip


@torch.library.custom_op("tempoquant::input_gradient", mutates_args=())
def _input_gradient(  # noqa: PLR0913 (operators take tensors, not tuples of them)
    grad_y: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    smoothing_factor: torch.Tensor | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    deflation: torch.Tensor | None,
    rotated: bool,
    format: str,
) -> torch.Tensor:
    tensors = LinearTensors(packed, scale, tensor_scale, smoothing_factor, up, down, deflation, None, None, rotated)
    with torch.autocast(grad_y.device.type, enabled=False):  # which would round a float32 gradient's operands
        return grad_y @ _weight(tensors, get_format(format), grad_y.dtype)


@_input_gradient.register_fake
def _(grad_y: torch.Tensor, packed: torch.Tensor, *others: Any) -> torch.Tensor:
    return grad_y.new_empty(*grad_y.shape[:-1], 2 * packed.shape[1])


def _weight(tensors: LinearTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """The effective weight, rounded to `dtype`: some rows at a time, for in float32 it takes several times the room."""
    out_features, half = tensors.packed.shape
    weight = torch.empty(out_features, 2 * half, dtype=dtype, device=tensors.packed.device)
    num_rows = max(1, NUMBERS_AT_ONCE // (2 * half))
    for start in range(0, out_features, num_rows):
        rows = slice(start, start + num_rows)
        up = None if tensors.up is None else tensors.up[rows]
        part = tensors._replace(packed=tensors.packed[rows], scale=tensors.scale[rows], up=up)
        weight[rows] = effective_weight(part, format)
    return weight
