"""PackedWeight: the dense weight that a 4-bit layer does not have, as a tensor without storage.

Libraries ask a linear for `weight.shape`, `.dtype` and `.device`. Those are answered. Whatever would read or write the
values raises, because a silent answer would be wrong: a LoRA fused into a dequantized copy is lost, and projections
fused from one are no longer 4-bit.
"""

from typing import Any

import torch

from tempoquant.errors import UnsupportedError

_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_cuda", "is_meta", "is_leaf", "grad",
                 "is_quantized", "is_sparse", "is_nested", "is_xpu", "is_mps", "is_cpu", "itemsize", "nbytes", "grad_fn")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.is_floating_point,
     torch.is_floating_point, torch.Tensor.is_complex, torch.is_complex, torch.Tensor.element_size}  # fmt: skip


class PackedWeight(torch.Tensor):
    """(out, in) of the given dtype and device, with no values."""

    @staticmethod
    def __new__(
        cls: type["PackedWeight"], out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> "PackedWeight":
        return torch.Tensor._make_wrapper_subclass(cls, (out_features, in_features), dtype=dtype, device=device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        _refuse(getattr(func, "__qualname__", str(func)))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse(str(func))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _refuse(operation: str) -> None:
    raise UnsupportedError(
        f"a 4-bit layer has no dense weight to read or change ({operation}): keep LoRA adapters loaded instead of fusing "
        "them, leave QKV projections unfused, and call dequantize() for a copy of the weight."
    )
