"""Large float32 products, at the speed of the processor and without touching a global setting."""

import torch
from torch.nn import functional

# Below this many rows, columns or terms the copies cost more than the faster product saves.
_WORTH_COPYING = 256
_ROWS_AT_ONCE = 4096  # of `linear`, which needs three copies of them


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute left · rightᵀ in the operands' own precision: (m, k) and (n, k) to (m, n), float32 or
    float64.

    On processors with AVX-512, large float32 products go through oneDNN, whose kernels use it on
    every make; the BLAS that PyTorch ships with (MKL) uses it on Intel's only and is half as fast
    elsewhere. The tensor layout selects oneDNN, not `torch.set_float32_matmul_precision`: that
    setting belongs to the whole process, and another thread that quantizes another denoiser would
    lose precision by it.
    """
    if _is_faster_in_onednn(left, right):
        return functional.linear(left.to_mkldnn(), right).to_dense()  # oneDNN takes the second operand as it is
    return left @ right.T


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sign: int = 1) -> None:
    """Add sign · left · rightᵀ to total in place, as `product` would; a GPU needs no memory in
    between.
    """
    if _is_faster_in_onednn(left, right):
        total.add_(product(left, right), alpha=sign)
    else:
        total.addmm_(left, right.T, alpha=sign)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute x · weightᵀ + bias as `product` sums it, some rows at a time: (…, in) and (out, in)
    to (…, out).
    """
    rows = x.reshape(-1, x.shape[-1])
    if not _is_faster_in_onednn(rows, weight):
        return functional.linear(x, weight, bias)
    y = x.new_empty(rows.shape[0], weight.shape[0])
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        y[start : start + _ROWS_AT_ONCE] = product(rows[start : start + _ROWS_AT_ONCE], weight)
    return (y if bias is None else y.add_(bias)).unflatten(0, x.shape[:-1])


def _is_faster_in_onednn(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and min(*left.shape, right.shape[0]) >= _WORTH_COPYING
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
