"""A linear whose weight alone has four bits (W4A16): y = x · Q(W)ᵀ + bias, with x as it comes.

It is for linears that read one timestep in place of tokens, such as modulation. Their time is that
of reading weights, and rounding one row of inputs would save nothing. Some rows of the weight are
expanded at a time.
"""

from collections.abc import Iterator

import torch

from tempoquant.errors import UnsupportedError
from tempoquant.exact_products import exact_linear
from tempoquant.formats import Format
from tempoquant.kernels import operators
from tempoquant.kernels.dispatch import Backend
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import NUMBERS_AT_ONCE, WeightTensors, dequantize_residual

EXPANDED_AT_ONCE = 2**26
"""Numbers of a weight that a kernel expands at a time: 128 MiB in bfloat16."""


def weights_alone_linear(x: torch.Tensor, weight: WeightTensors, format: Format) -> torch.Tensor:
    """Compute the linear in plain PyTorch. This defines the result.

    Sums run in float32 (float64 for float64 inputs), and y is rounded once.

    Args:
        x: (…, in), any float dtype.
        weight: without a branch.

    Returns:
        (…, out) in the dtype of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    raw = x.to(dtype)
    parts = [
        exact_linear(raw, dequantize_residual(rows, format, dtype), None if rows.bias is None else rows.bias.to(dtype))
        for rows in _in_rows(weight, NUMBERS_AT_ONCE)
    ]
    return torch.cat(parts, -1).to(x.dtype)


def multiply_weights_alone(x: torch.Tensor, weight: WeightTensors, format: Format, backend: str) -> torch.Tensor:
    """Compute `weights_alone_linear` for a backend: in bfloat16 by kernels, or as above.

    Args and result: as of `weights_alone_linear`.
    """
    if not x.is_floating_point():  # a model that casts inputs to its parameters' dtype, and found packed codes
        raise UnsupportedError(f"a linear with 4-bit weights and 16-bit inputs got inputs of {x.dtype}.")
    if backend == Backend.REFERENCE or x.dtype != torch.bfloat16:
        return weights_alone_linear(x, weight, format)
    tokens = QuantizedInput(x.reshape(-1, x.shape[-1]), None, None, None)
    parts = [
        operators.multiply(tokens, rows, format, x.dtype, Backend.BF16.value)
        for rows in _in_rows(weight, EXPANDED_AT_ONCE)
    ]
    return torch.cat(parts, -1).reshape(*x.shape[:-1], weight.packed.shape[0])


def _in_rows(weight: WeightTensors, numbers: int) -> Iterator[WeightTensors]:
    """Yield runs of a weight's rows, of so many numbers at most, or one row."""
    num_rows, in_features = weight.packed.shape[0], 2 * weight.packed.shape[1]
    size = max(1, numbers // in_features)
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        bias = None if weight.bias is None else weight.bias[rows]
        yield WeightTensors(weight.packed[rows], weight.scale[rows], weight.tensor_scale, None, bias)
