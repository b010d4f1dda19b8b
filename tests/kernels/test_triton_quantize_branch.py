"""The kernel that rounds inputs takes the branch out of them, and rounds some of them to eight
bits.
"""

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.formats import FORMATS, Format, ScaleRule
from tempoquant.kernels.quantize_to import quantize_to_fp8
from tempoquant.kernels.reference import round_input
from tests.kernels.rounded_inputs import (
    DEVICE,
    PLAIN,
    QUANTIZE,
    activations,
    assert_same,
    each_output,
    numbers_of,
    ones,
    stored_as,
    transform,
)
from tests.random_layers import random


@each_output
def test_rows_of_eight_bits_are_the_definitions_among_rows_of_four(format: Format, output: torch.dtype):
    x, of = activations(35, 192).bfloat16(), transform(192)
    x[0] = 0
    x[33, 3] = torch.nan
    flags = torch.tensor([True, False, False, False, True], device=DEVICE)
    z = of.quantizer_input(x.float(), None)
    for eight_bits, of_row in ((flags, flags.repeat_interleave(7)[:, None]), (True, True), (flags[1:2], False)):
        quantized = QUANTIZE[output](x, None, of, format, ScaleRule.CEIL, 0.9 * ones(), eight_bits)
        wanted = stored_as(round_input(z, format, ScaleRule.CEIL, 0.9 * ones(), of_row), output)
        found = numbers_of(quantized, format)
        is_bad = torch.arange(35, device=DEVICE) == 33
        assert_same(found[~is_bad], wanted[~is_bad])
        assert torch.equal(found.isnan().any(1), is_bad)


@pytest.mark.parametrize("magnitude", [2.0**-130, 2.0**-100, 1.0, 2.0**120])
def test_eight_bits_in_fp8_round_ties_and_subnormals_as_fp8_does(magnitude: float):
    """Every point between two E4M3 numbers of either sign, and its neighbours; 448 fixes the
    scale.
    """
    positive = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (positive[1:] + positive[:-1]) / 2
    points = torch.cat([middles, torch.nextafter(middles, middles * 2), torch.nextafter(middles, middles * 0)])
    x = torch.cat([points, -points, torch.tensor([448.0] * 12)])[None].mul(magnitude).to(DEVICE)
    format = FORMATS["nvfp4_m1"]
    quantized = quantize_to_fp8(x, None, PLAIN, format, ScaleRule.CEIL, ones(), True)
    assert_same(numbers_of(quantized, format), round_input(x, format, ScaleRule.CEIL, ones(), True))


@each_output
def test_with_a_branch_codes_differ_only_where_the_order_of_a_sum_can_move_them(format: Format, output: torch.dtype):
    for num_tokens, in_features, rank in ((33, 320, 3), (70, 128, 33)):
        of = transform(in_features, rank=rank)
        x, hidden = (
            activations(num_tokens, in_features).bfloat16(),
            random(num_tokens, rank, seed=8).bfloat16().to(DEVICE),
        )
        quantized = QUANTIZE[output](x, hidden, of, format, ScaleRule.LEAST_ERROR, ones())
        z = of.quantizer_input(x.float(), hidden.float())
        wanted = stored_as(round_input(z, format, ScaleRule.LEAST_ERROR, ones()), output)
        found = numbers_of(quantized, format)
        assert quantized.hidden is hidden
        assert (found == wanted).float().mean() >= 0.995
        # A level or a scale may be the next one: neither is more than twice as far from its input,
        # but for the error.
        amax = z.unflatten(-1, (-1, format.group_size)).abs().amax(-1).repeat_interleave(format.group_size, -1)
        assert bool(((found - wanted).abs() <= amax / 2).all())
        assert (found - z).square().sum() <= 1.001 * (wanted - z).square().sum()


@each_output
@pytest.mark.parametrize("rank", [1, 16, 40, 128])
def test_with_a_branch_whose_sums_are_exact_so_is_everything(format: Format, output: torch.dtype, rank: int):
    """Small multiples of powers of two: in whatever order, their products sum without rounding."""
    of = transform(192, rank=rank)
    of = of._replace(deflation=of.deflation.mul(20).round().clamp(-8, 8).div(32).bfloat16())
    x = activations(67, 192).bfloat16()
    hidden = random(67, rank, seed=8).mul(4).round().bfloat16().to(DEVICE)
    quantized = QUANTIZE[output](x, hidden, of, format, ScaleRule.LEAST_ERROR, ones())
    z = of.quantizer_input(x.float(), hidden.float())
    wanted = stored_as(round_input(z, format, ScaleRule.LEAST_ERROR, ones()), output)
    assert_same(numbers_of(quantized, format), wanted)
