"""The FP8 and the BF16 matrix product: on whole numbers they are exact, whatever the shape, and
round once.
"""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.kernels import bf16, fp8, triton_gemm
from tempoquant.kernels.dispatch import promoted_sums
from tempoquant.kernels.quantized_input import QuantizedInput
from tests.kernels.products import (
    DEVICE,
    between_poison,
    branch,
    expected,
    generator,
    poisoned_memory,
    powers_of_two,
    whole_numbers,
)

pytestmark = pytest.mark.usefixtures(poisoned_memory.__name__)
__all__ = ["poisoned_memory"]

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
# Less than a tile, more than one, no multiple of any; one token; fewer inputs than are summed at a
# time.
SHAPES = [(1, 16, 16), (1, 144, 272), (129, 272, 144), (77, 400, 400), (130, 16, 128)]
RANKS = [0, 1, 16, 32, 33, 65]
# Sums of FP8 products are aligned to the largest of an instruction's 32 products and the sum so
# far, and cut after 13 bits; four instructions of 33 numbers make up the 128 products that are
# summed apart.
SHORT_SUM_ERROR = 4 * 33 * 2.0**-13
each_way = pytest.mark.parametrize(
    ("capability", "is_described", "promoted"),
    [
        (89, False, True),
        (89, False, False),
        (90, False, False),
        (90, True, True),
        (90, True, False),
        (100, True, False),
    ],
)


def fp8_operands(
    num_tokens: int, num_outputs: int, num_inner: int, rank: int, dtype: torch.dtype = E4M3
) -> tuple[QuantizedInput, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return quantized input, weight, row scale and up: whole numbers and powers of two."""
    hidden, up = branch(num_tokens, num_outputs, rank)
    values = between_poison(whole_numbers(num_tokens, num_inner, largest=6, seed=1), dtype)
    weight = between_poison(whole_numbers(num_outputs, num_inner, largest=6, seed=2), E4M3)
    scale, row_scale = powers_of_two(num_tokens, seed=3), powers_of_two(num_outputs, seed=4)
    return QuantizedInput(values, scale.to(DEVICE), hidden, None), weight, row_scale.to(DEVICE), up


def bias_of(num_outputs: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return whole_numbers(num_outputs, largest=100, seed=5).to(dtype).to(DEVICE)


@each_way
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_multiplied_without_error_and_rounded_once(capability, is_described, promoted, shape):
    quantized, weight, row_scale, up = fp8_operands(*shape, rank=3)
    bias = bias_of(shape[1])
    product = triton_gemm.Product(quantized.values, weight, quantized.scale, row_scale, quantized.hidden, up, bias)
    with promoted_sums() if promoted else contextlib.nullcontext():
        y = triton_gemm.multiply(product, BF16, fp8.TILES, capability, is_described)
    assert torch.equal(y.cpu(), expected(quantized, weight, row_scale, up, bias).to(BF16))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_branches_of_every_rank_and_biases_are_added_before_the_rounding(rank, has_bias, dtype):
    quantized, weight, row_scale, up = fp8_operands(67, 48, 80, rank)
    bias = bias_of(48) if has_bias else None
    y = fp8.fp8_multiply(quantized, weight, row_scale, up, bias, dtype)
    assert torch.equal(y.cpu(), expected(quantized, weight, row_scale, up, bias).to(dtype))


def test_input_in_e5m2_is_multiplied_by_weights_in_e4m3():
    quantized, weight, row_scale, _ = fp8_operands(65, 32, 144, 0, E5M2)
    y = fp8.fp8_multiply(quantized, weight, row_scale, None, None, torch.float32)
    assert torch.equal(y.cpu(), expected(quantized, weight, row_scale, None, None).float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_tensor_scale", [False, True])
def test_the_bf16_product_is_exact_on_whole_numbers_too(shape, has_tensor_scale):
    num_tokens, num_outputs, num_inner = shape
    hidden, up = branch(num_tokens, num_outputs, 33)
    values = between_poison(whole_numbers(num_tokens, num_inner, largest=90, seed=1), BF16)
    weight = between_poison(whole_numbers(num_outputs, num_inner, largest=90, seed=2), BF16)
    tensor_scale = torch.tensor(0.375).to(DEVICE) if has_tensor_scale else None
    quantized, bias = QuantizedInput(values, None, hidden, None), bias_of(num_outputs, torch.float32)
    y = bf16.bf16_multiply(quantized, weight, tensor_scale, up, bias, BF16)
    assert torch.equal(y.cpu(), expected(quantized, weight, tensor_scale, up, bias).to(BF16))


def test_on_any_numbers_the_error_stays_below_that_of_float32_sums():
    num_tokens, num_outputs, num_inner, rank = 70, 96, 656, 32
    hidden = torch.randn(num_tokens, rank, generator=generator(1)).bfloat16().to(DEVICE)
    up = torch.randn(num_outputs, rank, generator=generator(2)).bfloat16().to(DEVICE)
    values = between_poison(torch.randn(num_tokens, num_inner, generator=generator(3)) * 20, E4M3)
    weight = between_poison(torch.randn(num_outputs, num_inner, generator=generator(4)) * 20, E4M3)
    row_scale = torch.rand(num_outputs, generator=generator(5)).to(DEVICE)
    quantized = QuantizedInput(values, powers_of_two(num_tokens, seed=6).to(DEVICE), hidden, None)
    with promoted_sums():
        y = fp8.fp8_multiply(quantized, weight, row_scale, up, None, torch.float32).cpu()
    magnitudes = QuantizedInput(values.float().abs(), quantized.scale, hidden.abs(), None)
    sum_of_magnitudes = expected(magnitudes, weight.float().abs(), row_scale, up.abs(), None)
    capability = triton_gemm.capability_of(values.device)
    with promoted_sums():
        is_short = DEVICE == "cuda" and triton_gemm.how_sums_are_split(E4M3, capability) != "no"
    error = (num_inner + rank + 2) * 2.0**-24 + (SHORT_SUM_ERROR if is_short else 0.0)
    assert ((y - expected(quantized, weight, row_scale, up, None)).abs() <= error * sum_of_magnitudes).all()


@pytest.mark.parametrize(("capability", "way"), [(89, "add"), (90, "mma"), (100, "no"), (120, "add")])
def test_sums_run_on_unless_promoting_is_asked_for_where_they_are_short(capability, way):
    assert triton_gemm.how_sums_are_split(E4M3, capability) == "no"
    with promoted_sums():
        assert triton_gemm.how_sums_are_split(E4M3, capability) == way
        assert triton_gemm.how_sums_are_split(BF16, capability) == "no"
    assert triton_gemm.how_sums_are_split(E4M3, capability) == "no"


def test_a_token_that_is_not_a_number_spoils_no_other():
    quantized, weight, row_scale, up = fp8_operands(66, 32, 64, 16)
    quantized.scale[65] = torch.nan
    y = fp8.fp8_multiply(quantized, weight, row_scale, up, None, BF16)
    assert y[65].isnan().all() and y[:65].isfinite().all()


def test_no_tokens_make_no_output():
    quantized, weight, row_scale, _ = fp8_operands(0, 32, 64, 0)
    assert fp8.fp8_multiply(quantized, weight, row_scale, None, None, BF16).shape == (0, 32)


@pytest.mark.parametrize("module", [fp8, bf16])
def test_few_tokens_take_the_smaller_tile_and_new_devices_the_newest_known(module):
    newest = max(module.TILES)
    assert triton_gemm.tile_for(module.TILES, 1, 999) == module.TILES[newest][1]
    assert triton_gemm.tile_for(module.TILES, 32_760, newest) == module.TILES[newest][0]
    assert triton_gemm.tile_for(module.TILES, 32_760, 0) == module.TILES[min(module.TILES)][0]
