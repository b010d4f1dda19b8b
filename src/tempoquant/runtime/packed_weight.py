"""PackedWeight: the dense weight that a 4-bit layer does not have, as a tensor without storage.

Libraries ask a linear for `weight.shape`, `.dtype` and `.device`. The tensor answers these. Every
operation that would read or write the values raises, because a silent answer would be wrong: a LoRA
fused into a dequantized copy would be lost, and projections fused from one would no longer be
4-bit.
"""

from typing import Any

import torch

from tempoquant.errors import UnsupportedError

_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "itemsize",
    "nbytes",
    "requires_grad",
    "grad",
    "grad_fn",
    "is_leaf",
    "is_cpu",
    "is_cuda",
    "is_meta",
    "is_mps",
    "is_xpu",
    "is_nested",
    "is_quantized",
    "is_sparse",
)
_METADATA = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES} | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
    torch.Tensor.is_complex,
    torch.is_complex,
}


class PackedWeight(torch.Tensor):
    """A tensor (out, in) of the given dtype and device, without values."""

    @staticmethod
    def __new__(
        cls: type["PackedWeight"], out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> "PackedWeight":
        return torch.Tensor._make_wrapper_subclass(cls, (out_features, in_features), dtype=dtype, device=device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        name = getattr(func, "__name__", str(func))
        raise _refusal(func.__self__.__name__ if name == "__get__" else name)  # a property: weight.data, weight.T

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise _refusal(str(func))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _refusal(operation: str) -> UnsupportedError:
    return UnsupportedError(
        f"a 4-bit layer has no dense weight to read or change ({operation}): keep LoRA adapters loaded instead of "
        "fusing them, leave QKV projections unfused, and call dequantize() for a copy of the weight."
    )
