"""The vendor's products give what ours give, but for roundings to bfloat16 that they say they
make.
"""

import pytest
import torch

from benchmarks.vendor_products import bf16_linear, fp8_scaled_mm
from tempoquant.kernels.quantized_input import QuantizedInput
from tests.kernels.products import DEVICE, branch, expected, powers_of_two, whole_numbers

BF16 = torch.bfloat16
BF16_UNIT = (
    2.0**-8
)  # the largest relative error of rounding, 2^-9, twice: what a sum rounds to may lie across a power of two
NUM_TOKENS, OUT, IN = 48, 64, 160

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no FP8"
)


def fp8_input(rank: int, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[QuantizedInput, torch.Tensor | None]:
    hidden, up = branch(NUM_TOKENS, OUT, rank)
    values = whole_numbers(NUM_TOKENS, IN, largest=6, seed=1).to(dtype).to(DEVICE)
    return QuantizedInput(values, powers_of_two(NUM_TOKENS, seed=3).to(DEVICE), hidden, None), up


def fp8_weight() -> tuple[torch.Tensor, torch.Tensor]:
    weight = whole_numbers(OUT, IN, largest=6, seed=2).to(torch.float8_e4m3fn).to(DEVICE)
    return weight, powers_of_two(OUT, seed=4).to(DEVICE)


def bias_of_outputs() -> torch.Tensor:
    return whole_numbers(OUT, largest=100, seed=5).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_without_a_branch_the_fp8_product_of_whole_numbers_is_rounded_once(dtype, has_bias):
    quantized, _ = fp8_input(0, dtype)
    weight, row_scale = fp8_weight()
    bias = bias_of_outputs() if has_bias else None
    y = fp8_scaled_mm(quantized, weight, row_scale, None, bias, BF16)
    assert torch.equal(y.cpu(), expected(quantized, weight, row_scale, None, bias).to(BF16))


@pytest.mark.parametrize("rank", [1, 16, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_with_a_branch_the_fp8_product_is_rounded_once_more(rank, has_bias):
    quantized, up = fp8_input(rank)
    weight, row_scale = fp8_weight()
    bias = bias_of_outputs() if has_bias else None
    y = fp8_scaled_mm(quantized, weight, row_scale, up, bias, BF16).cpu()
    first = expected(quantized._replace(hidden=None), weight, row_scale, None, bias)
    wanted = expected(quantized, weight, row_scale, up, bias)
    assert ((y - wanted).abs() <= BF16_UNIT * (first.abs() + wanted.abs())).all()


@pytest.mark.parametrize("rank", [0, 1, 33])
@pytest.mark.parametrize("has_tensor_scale", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_bf16_product_differs_by_its_roundings(rank, has_tensor_scale, has_bias):
    hidden, up = branch(NUM_TOKENS, OUT, rank)
    quantized = QuantizedInput(
        whole_numbers(NUM_TOKENS, IN, largest=90, seed=1).to(BF16).to(DEVICE), None, hidden, None
    )
    weight = whole_numbers(OUT, IN, largest=90, seed=2).to(BF16).to(DEVICE)
    tensor_scale = torch.tensor(0.3).to(DEVICE) if has_tensor_scale else None
    bias = bias_of_outputs() if has_bias else None
    y = bf16_linear(quantized, weight, tensor_scale, up, bias, BF16).cpu()
    first = expected(quantized._replace(hidden=None), weight, tensor_scale, None, None)
    with_bias = expected(quantized._replace(hidden=None), weight, tensor_scale, None, bias)
    wanted = expected(quantized, weight, tensor_scale, up, bias)
    assert ((y - wanted).abs() <= BF16_UNIT * (2 * first.abs() + with_bias.abs() + wanted.abs())).all()
