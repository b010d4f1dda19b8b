"""PyTorch's own matrix products, to time ours beside: the vendor's library on a GPU, and a CPU
without Triton.

Operands and results are those of fp8 and bf16; only rounding differs: a library writes its product
in 16 bits, and the branch and the bias are added to that in a second pass over y.
"""

import torch
from torch.nn import functional

from tempoquant.kernels.quantized_input import QuantizedInput


def fp8_scaled_mm(
    quantized: QuantizedInput,
    weight: torch.Tensor,
    row_scale: torch.Tensor,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute `fp8.fp8_multiply` by `torch._scaled_mm`, with sums promoted to float32 (no fast
    accumulation).

    The product is rounded to bfloat16, row-wise scaling's only dtype. Branch and bias are then
    added by one more product whose sum starts from it: one rounding more, or two with a bias (in
    bfloat16) beside a branch.

    Returns:
        (tokens, out) in `dtype`.
    """
    assert quantized.scale is not None
    product = torch._scaled_mm(
        quantized.values,
        weight.t(),
        scale_a=quantized.scale.unsqueeze(1),
        scale_b=row_scale.unsqueeze(0),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return _add_branch(product, quantized.hidden, up).to(dtype)


def bf16_linear(
    quantized: QuantizedInput,
    weight: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    up: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute `bf16.bf16_multiply` by `torch.nn.functional.linear`.

    The product is rounded to bfloat16, again by the tensor scale, and again with bias and branch.

    Returns:
        (tokens, out) in `dtype`.
    """
    if tensor_scale is None:
        product = functional.linear(quantized.values, weight, None if bias is None else bias.bfloat16())
    else:
        product = functional.linear(quantized.values, weight).mul_(tensor_scale)
        product = product if bias is None else product.add_(bias)
    return _add_branch(product, quantized.hidden, up).to(dtype)


def _add_branch(y: torch.Tensor, hidden: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor:
    """Add hidden · upᵀ to y in y's memory, summed in float32 and rounded once."""
    return y if hidden is None or up is None else y.addmm_(hidden, up.t())
