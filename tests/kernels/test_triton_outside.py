"""Tokens that FP8 cannot hold are multiplied as they are, and no other row of the result
changes.
"""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tempoquant.formats import (
    MXFP4,
    ScaleRule,
    from_codes,
    group_amax,
    pack,
    quantize_activation,
    scale_to_bytes,
    to_codes,
)
from tempoquant.formats.scales import group_scale
from tempoquant.input_transform import InputTransform
from tempoquant.kernels import fp8
from tempoquant.kernels.fp8 import fp8_multiply
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors
from tempoquant.kernels.triton_outside import GROUP, replace_outside_rows
from tempoquant.kernels.triton_quantize_outside import store_packed
from tests.kernels.products import DEVICE, branch, generator, powers_of_two, whole_numbers

E4M3 = torch.float8_e4m3fn


def outside_numbers(num_tokens: int, num_inner: int) -> torch.Tensor:
    """Return MXFP4 numbers (tokens, in) whose groups are as far apart as 2^40."""
    x = torch.randn(num_tokens, num_inner, generator=generator(1)).unflatten(1, (-1, GROUP))
    x *= torch.exp2(whole_numbers(num_tokens, num_inner // GROUP, 1, largest=20, seed=2))
    x = x.flatten(1)
    scale = group_scale(group_amax(x, MXFP4), MXFP4, ScaleRule.CEIL)
    return from_codes(to_codes(x, scale, MXFP4), scale, MXFP4)


def stored_rows(numbers: torch.Tensor) -> torch.Tensor:
    """Return the same, as a checkpoint stores weights: packed codes, then scale bytes, as many
    bytes a row as numbers.
    """
    scale = group_scale(group_amax(numbers, MXFP4), MXFP4, ScaleRule.CEIL)
    rows = torch.zeros(numbers.shape, dtype=torch.uint8)
    packed, stored = pack(to_codes(numbers, scale, MXFP4), MXFP4), scale_to_bytes(scale, MXFP4)
    rows[:, : packed.shape[1]] = packed
    rows[:, packed.shape[1] : packed.shape[1] + stored.shape[1]] = stored
    return rows


@pytest.mark.parametrize("shape", [(1, 16, 32), (3, 1040, 32), (130, 80, 160)], ids=str)
@pytest.mark.parametrize("rank", [0, 17])
def test_outside_rows_become_their_product_and_others_stay(shape, rank):
    num_tokens, num_outputs, num_inner = shape
    hidden, up = branch(num_tokens, num_outputs, rank)
    numbers, is_outside = outside_numbers(num_tokens, num_inner), torch.arange(num_tokens) % 65 == 0
    inside = whole_numbers(num_tokens, num_inner, largest=6, seed=3).to(E4M3)
    values = torch.where(is_outside[:, None], stored_rows(numbers), inside.view(torch.uint8)).view(E4M3).to(DEVICE)
    quantized = QuantizedInput(values, powers_of_two(num_tokens, seed=4).to(DEVICE), hidden, is_outside.to(DEVICE))
    weight = whole_numbers(num_outputs, num_inner, largest=6, seed=5)
    row_scale, bias = powers_of_two(num_outputs, seed=6), whole_numbers(num_outputs, largest=9, seed=7).to(DEVICE)
    operands = (weight.to(E4M3).to(DEVICE), row_scale.to(DEVICE), up, bias)
    before = fp8_multiply(quantized, *operands, torch.float32)
    y = replace_outside_rows(before.clone(), quantized, *operands).cpu()
    assert torch.equal(y[~is_outside], before.cpu()[~is_outside]) and y[~is_outside].isfinite().all()
    wanted = numbers.double() @ (weight * row_scale[:, None]).double().T + bias.cpu().double()
    magnitudes = numbers.double().abs() @ (weight * row_scale[:, None]).double().abs().T + bias.cpu().double().abs()
    if hidden is not None and up is not None:
        wanted += hidden.cpu().double() @ up.cpu().double().T
        magnitudes += hidden.cpu().double().abs() @ up.cpu().double().abs().T
    error = (y.double() - wanted).abs()[is_outside]
    assert (error <= (num_inner + rank + 2) * 2.0**-24 * magnitudes[is_outside]).all()


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.LEAST_ERROR])
@pytest.mark.parametrize(("rank", "rotated"), [(0, False), (16, False), (0, True)])
def test_the_fp8_backend_multiplies_tokens_outside_its_window_as_the_reference_rounds_them(rule, rank, rotated):
    num_tokens, num_inner, num_outputs = 5, 192, 32
    x = whole_numbers(num_tokens, num_inner, largest=50, seed=1)
    x[2, 64:128] *= 2.0**-30
    x[4, 160:] *= 2.0**20
    x[4, :32] = 0
    codes = whole_numbers(num_outputs, num_inner, largest=7, seed=5).to(torch.int8)
    scale = powers_of_two(num_outputs, num_inner // GROUP, seed=6)
    hidden, up = branch(num_tokens, num_outputs, rank)
    deflation = None if rank == 0 else whole_numbers(num_inner, rank, largest=1, seed=7).bfloat16()
    packed, stored_scale = pack(codes, MXFP4).to(DEVICE), scale_to_bytes(scale, MXFP4).to(DEVICE)
    transform = InputTransform(rotated=rotated, deflation=deflation)
    there = transform._replace(deflation=None if deflation is None else deflation.to(DEVICE))
    z = transform.quantizer_input(x.double(), None if hidden is None else hidden.cpu().double())
    quantized = fp8.quantize_input(x.to(DEVICE), hidden, there, MXFP4, rule, torch.ones(1, device=DEVICE))
    assert quantized.outside.tolist()[2::2] == ([True, True] if rank == 0 else [False, True])
    weight_tensors = WeightTensors(packed, stored_scale, up=up)
    y = fp8.multiply(quantized, weight_tensors, MXFP4, torch.float32).cpu()
    numbers, weight = quantize_activation(z.float(), MXFP4, rule).double(), from_codes(codes, scale, MXFP4).double()
    wanted, magnitudes = numbers @ weight.T, numbers.abs() @ weight.abs().T
    if hidden is not None and up is not None:
        wanted += hidden.cpu().double() @ up.cpu().double().T
        magnitudes += hidden.cpu().double().abs() @ up.cpu().double().abs().T
    assert ((y.double() - wanted).abs() <= (num_inner + rank + 2) * 2.0**-24 * magnitudes).all()


@triton.jit
def _store_kernel(stored, scale, level, rows, is_stored, IN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    row, group, within = tl.arange(0, 4), tl.arange(0, GROUPS), tl.arange(0, GROUP)
    places = row[:, None] * GROUPS + group[None, :]
    mask = tl.load(is_stored + row) != 0
    levels = tl.load(level + places[:, :, None] * GROUP + within[None, None, :])
    store_packed(stored, tl.load(rows + row), mask, 0, tl.load(scale + places), levels, IN)


def test_what_is_stored_of_an_outside_row_is_what_a_checkpoint_stores():
    numbers = outside_numbers(4, 4 * GROUP)
    scale = group_scale(group_amax(numbers, MXFP4), MXFP4, ScaleRule.CEIL)
    level = (numbers.unflatten(1, (-1, GROUP)) / scale[:, :, None]).contiguous()
    stored = torch.full((7, 3 * GROUP), 77, dtype=torch.uint8, device=DEVICE)
    rows, is_stored = torch.tensor([5, 0, 3, 1]), torch.tensor([True, False, True, True])
    arguments = (scale, level, rows, is_stored)
    _store_kernel[(1,)](stored, *(each.to(DEVICE) for each in arguments), 3 * GROUP, 4, GROUP)
    wanted = torch.full_like(stored, 77, device="cpu")
    half, used = 3 * GROUP // 2, 3 * GROUP // 2 + 3
    wanted[rows[is_stored], :used] = stored_rows(numbers[:, : 3 * GROUP])[is_stored][:, :used]
    assert half < used and torch.equal(stored.cpu(), wanted)
