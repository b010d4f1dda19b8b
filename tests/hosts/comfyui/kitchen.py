"""comfy-kitchen, ComfyUI's own library of formats and kernels: its eager backend reads our files on
a CPU.
"""

import os
from typing import Any

import pytest
import torch

NEEDED = "TEMPOQUANT_NEEDS_COMFY_KITCHEN"
"""Environment variable that .ci/run sets: there, a missing library is a failure."""
LAYOUT = "TensorCoreNVFP4Layout"


def kitchen() -> Any:
    """Return the library. Without it the test is skipped, or fails if NEEDED is set."""
    try:
        import comfy_kitchen
    except ImportError:
        reason = "there is no comfy-kitchen here: install the extra `test` (Linux on x86-64)"
        if os.environ.get(NEEDED):
            pytest.fail(reason)
        pytest.skip(reason)
    return comfy_kitchen


def decoded(tensors: dict[str, torch.Tensor], out_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight (out, in) that comfy-kitchen finds in a layer's tensors, as ComfyUI's
    loader hands them over.
    """
    kitchen()
    from comfy_kitchen.tensor import QuantizedTensor, TensorCoreNVFP4Layout

    weight = tensors["weight"]
    params = TensorCoreNVFP4Layout.Params(
        scale=tensors["weight_scale_2"], block_scale=tensors["weight_scale"], orig_dtype=dtype,
        orig_shape=(out_features, 2 * weight.shape[1]),
    )  # fmt: skip
    return QuantizedTensor(weight, LAYOUT, params).dequantize()
