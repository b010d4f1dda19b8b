"""The INT8 matrix product: exact on whole numbers, scaled group by group, rounded once."""

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.errors import UnsupportedError
from tempoquant.kernels.int8 import int8_multiply
from tempoquant.kernels.quantized_input import QuantizedInput
from tests.kernels.products import (
    DEVICE,
    between_poison,
    branch,
    expected,
    poisoned_memory,
    powers_of_two,
    whole_numbers,
)

pytestmark = pytest.mark.usefixtures(poisoned_memory.__name__)
__all__ = ["poisoned_memory"]

BF16 = torch.bfloat16


def operands(
    num_tokens: int, num_outputs: int, num_groups: int, rank: int = 0, group: int = 64, largest: int = 7
) -> tuple[QuantizedInput, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return quantized input, codes, scale and up."""
    hidden, up = branch(num_tokens, num_outputs, rank)
    values = between_poison(whole_numbers(num_tokens, num_groups * group, largest=largest, seed=1), torch.int8)
    codes = between_poison(whole_numbers(num_outputs, num_groups * group, largest=7, seed=2), torch.int8)
    scale = powers_of_two(num_tokens, num_groups, seed=3).to(DEVICE)
    return (
        QuantizedInput(values, scale, hidden, None),
        codes,
        powers_of_two(num_outputs, num_groups, seed=4).to(DEVICE),
        up,
    )


@pytest.mark.parametrize("shape", [(1, 16, 1), (129, 144, 3), (65, 272, 2)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 16, 32, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_groups_of_codes_are_multiplied_without_error_and_rounded_once(shape, rank, has_bias):
    quantized, codes, scale, up = operands(*shape, rank)
    bias = whole_numbers(shape[1], largest=100, seed=5).to(DEVICE) if has_bias else None
    y = int8_multiply(quantized, codes, scale, up, bias, BF16)
    assert torch.equal(y.cpu(), expected(quantized, codes, scale, up, bias).to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_result_has_the_dtype_asked_for(dtype):
    quantized, codes, scale, up = operands(70, 48, 2, 16)
    y = int8_multiply(quantized, codes, scale, up, None, dtype)
    assert torch.equal(y.cpu(), expected(quantized, codes, scale, up, None).to(dtype))


def test_scales_may_lie_group_by_group_in_memory():
    quantized, codes, scale, _ = operands(70, 48, 3)
    turned = quantized._replace(scale=quantized.scale.t().contiguous().t())
    y = int8_multiply(turned, codes, scale.t().contiguous().t(), None, None, torch.float32)
    assert torch.equal(y.cpu(), expected(quantized, codes, scale, None, None).float())


@pytest.mark.parametrize("group", [32, 128])
def test_inputs_of_eight_bits_with_one_scale_a_token_are_exact_in_other_groups_too(group):
    quantized, codes, scale, _ = operands(3, 32, 2, group=group, largest=127)
    quantized = quantized._replace(scale=quantized.scale[:, :1].expand(-1, 2))
    y = int8_multiply(quantized, codes, scale, None, None, torch.float32)
    assert torch.equal(y.cpu(), expected(quantized, codes, scale, None, None).float())


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_of_a_group_are_exact(sign):
    values, codes = torch.full((1, 128), 127.0), torch.full((16, 128), sign * 127.0)
    quantized = QuantizedInput(between_poison(values, torch.int8), torch.ones(1, 1, device=DEVICE), None, None)
    y = int8_multiply(
        quantized, between_poison(codes, torch.int8), torch.ones(16, 1, device=DEVICE), None, None, torch.float32
    )
    assert (y == sign * 128 * 127**2).all()


def test_a_token_that_is_not_a_number_spoils_no_other():
    quantized, codes, scale, up = operands(66, 32, 2, 16)
    quantized.scale[65] = torch.nan
    y = int8_multiply(quantized, codes, scale, up, None, BF16)
    assert y[65].isnan().all() and y[:65].isfinite().all()


@pytest.mark.parametrize("group", [16, 512])
def test_groups_that_the_product_cannot_sum_are_refused(group):
    quantized, codes, scale, _ = operands(2, 16, 1, group=group)
    with pytest.raises(UnsupportedError, match=f"not of {group}"):
        int8_multiply(quantized, codes, scale, None, None, BF16)
