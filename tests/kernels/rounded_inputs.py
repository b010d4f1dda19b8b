"""Shared parts of the tests of the kernel that rounds inputs: inputs, transforms, and decoded
values.
"""

import pytest
import torch

from tempoquant.formats import FORMATS, Format, ScaleRule
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.fp8_window import dtypes_of
from tempoquant.kernels.quantize_to import quantize_to_bf16, quantize_to_fp8, quantize_to_int8
from tempoquant.kernels.quantized_input import QuantizedInput
from tests.random_layers import random, random_layer, random_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUANTIZE = {torch.float8_e4m3fn: quantize_to_fp8, torch.bfloat16: quantize_to_bf16, torch.int8: quantize_to_int8}
OUTPUTS = [(format, dtype) for format in FORMATS.values() for dtype in dtypes_of(format)]
each_output = pytest.mark.parametrize(
    ("format", "output"),
    OUTPUTS,
    ids=[f"{format.name}-{str(dtype).removeprefix('torch.')}" for format, dtype in OUTPUTS],
)
each_rule = pytest.mark.parametrize("rule", ScaleRule)


def transform(in_features: int, *, rank: int = 0, **has: bool) -> InputTransform:
    """Make a random layer's transform; `has` as for `random_layer`."""
    found = random_layer(random_linear(in_features, 16), rank=rank, size=0.3, **has).input_transform
    return InputTransform(*(each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in found))


PLAIN = InputTransform()


def activations(num_tokens: int, in_features: int) -> torch.Tensor:
    """Make features of very different size, as in video transformers."""
    return (random(num_tokens, in_features, seed=3) * random(in_features, seed=4).mul(1.5).exp()).to(DEVICE)


def ones(count: int = 1) -> torch.Tensor:
    return torch.ones(count, device=DEVICE)


def numbers_of(quantized: QuantizedInput, format: Format) -> torch.Tensor:
    """Decode the values, (tokens, in) float32."""
    values = quantized.values.float()
    if quantized.values.dtype == torch.float8_e4m3fn:
        return values * quantized.scale[:, None]
    if quantized.values.dtype == torch.int8:
        return (values.unflatten(-1, (-1, format.group_size)) * quantized.scale.unsqueeze(-1)).flatten(-2)
    return values


def stored_as(wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the definition's numbers in a backend's storage: only bfloat16 rounds, and only
    INT4.
    """
    return wanted.bfloat16().float() if dtype == torch.bfloat16 else wanted


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
