"""The gradient of a 4-bit linear with respect to its input, by the straight-through estimate.

    grad_x = grad_y · W     W: what the layer's tensors stand for (`reference.effective_weight`)

Source: Bengio, Léonard and Courville, arXiv 1308.3432: rounding counts as the identity. Only the
layer's stored tensors are needed, so nothing is kept for the backward pass: W is recomputed for the
product, in the dtype of grad_y as in a 16-bit model, and lives as long as the product.
"""

from typing import Any, NamedTuple

import torch

from tempoquant.formats import Format, get_format
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.reference import NUMBERS_AT_ONCE, WeightTensors, effective_weight


class GradientTensors(NamedTuple):
    """The tensors of W in one flat tuple, as autograd keeps tensors and operators take them."""

    packed: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor | None
    up: torch.Tensor | None
    smoothing_factor: torch.Tensor | None
    down: torch.Tensor | None
    deflation: torch.Tensor | None


def gradient_tensors(transform: InputTransform, weight: WeightTensors) -> GradientTensors:
    """Return the layer's tensors for the gradient: neither offset nor bias, which do not change
    it.
    """
    return GradientTensors(
        weight.packed, weight.scale, weight.tensor_scale, weight.up, transform.smoothing_factor, transform.down,
        transform.deflation,
    )  # fmt: skip


def input_gradient(grad_y: torch.Tensor, tensors: GradientTensors, format: Format, rotated: bool) -> torch.Tensor:
    """Compute the gradient of the dequantized layer.

    Args:
        grad_y: (…, out), any float dtype.
        rotated: whether the layer's input is rotated.

    Returns:
        (…, in) in the dtype of grad_y.
    """
    return _input_gradient(grad_y, *tensors, rotated=rotated, format=format.name)


@torch.library.custom_op("tempoquant::input_gradient", mutates_args=())
def _input_gradient(  # noqa: PLR0913 (operators take tensors, not tuples of them)
    grad_y: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    smoothing_factor: torch.Tensor | None,
    down: torch.Tensor | None,
    deflation: torch.Tensor | None,
    *,
    rotated: bool,
    format: str,
) -> torch.Tensor:
    transform = InputTransform(smoothing_factor, rotated, down, deflation)
    weight = WeightTensors(packed, scale, tensor_scale, up)
    with torch.autocast(grad_y.device.type, enabled=False):  # autocast would round a float32 gradient's operands
        return grad_y @ _dense(transform, weight, get_format(format), grad_y.dtype)


@_input_gradient.register_fake
def _(grad_y: torch.Tensor, packed: torch.Tensor, *_others: Any, **_settings: Any) -> torch.Tensor:
    return grad_y.new_empty(*grad_y.shape[:-1], 2 * packed.shape[1])


def _dense(transform: InputTransform, weight: WeightTensors, format: Format, dtype: torch.dtype) -> torch.Tensor:
    """Compute the effective weight, rounded to `dtype`, some rows at a time, since float32 takes
    several times the memory.
    """
    out_features, half = weight.packed.shape
    dense = torch.empty(out_features, 2 * half, dtype=dtype, device=weight.packed.device)
    num_rows = max(1, NUMBERS_AT_ONCE // (2 * half))
    for start in range(0, out_features, num_rows):
        rows = slice(start, start + num_rows)
        up = None if weight.up is None else weight.up[rows]
        part = weight._replace(packed=weight.packed[rows], scale=weight.scale[rows], up=up)
        dense[rows] = effective_weight(transform, part, format)
    return dense
