"""The kernel that rounds inputs makes, bit for bit, the numbers of the definition."""

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.errors import UnsupportedError
from tempoquant.formats import FORMATS, Format, ScaleRule
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.fp8_window import dtypes_of
from tempoquant.kernels.quantize_to import quantize_to_fp8
from tempoquant.kernels.quantized_input import QuantizedInput, empty_result
from tempoquant.kernels.reference import round_input
from tempoquant.kernels.triton_quantize import columns_launch, quantize_launch
from tests.kernels.rounded_inputs import (
    DEVICE,
    PLAIN,
    QUANTIZE,
    activations,
    assert_same,
    each_output,
    each_rule,
    numbers_of,
    ones,
    stored_as,
    transform,
)
from tests.random_layers import random


def check(
    x: torch.Tensor, format: Format, output: torch.dtype, rule: ScaleRule, of: InputTransform = PLAIN
) -> QuantizedInput:
    """Quantize with clip ratio 0.9 and hold every row that fits to the definition."""
    quantized = QUANTIZE[output](x, None, of, format, rule, 0.9 * ones())
    wanted = stored_as(round_input(of.quantizer_input(x.float(), None), format, rule, 0.9 * ones()), output)
    fits = slice(None) if quantized.outside is None else ~quantized.outside
    assert_same(numbers_of(quantized, format)[fits], wanted[fits])
    return quantized


@each_output
@each_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_without_a_branch_the_numbers_are_the_definitions(
    format: Format, output: torch.dtype, rule: ScaleRule, dtype: torch.dtype
):
    num_tokens, in_features = {torch.bfloat16: (33, 320), torch.float16: (7, 192), torch.float32: (1, 64)}[dtype]
    quantized = check(activations(num_tokens, in_features).to(dtype), format, output, rule, transform(in_features))
    assert quantized.outside is None or not bool(quantized.outside.any())


@each_output
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_what_a_layer_does_not_have_is_left_out(
    format: Format, output: torch.dtype, smoothed: bool, centred: bool, rotated: bool
):
    of = transform(128, smoothed=smoothed, centred=centred, rotated=rotated)
    check(activations(3, 128), format, output, ScaleRule.CEIL, of)


@each_output
@each_rule
def test_a_rotated_row_has_the_numbers_of_the_definition(format: Format, output: torch.dtype, rule: ScaleRule):
    check(activations(5, 192).bfloat16(), format, output, rule, transform(192, rotated=True))


@each_output
@pytest.mark.parametrize("loudest", [0.0, 2.0**12, 2.0**100, torch.nan])
def test_a_row_is_rounded_the_same_whatever_its_neighbours_are(format: Format, output: torch.dtype, loudest: float):
    """A usual row has everything fixed beforehand, but an unusual one makes its neighbours run a
    second pass.
    """
    x = activations(3, 192).clamp(-20, 20)
    alone = QUANTIZE[output](x, None, PLAIN, format, ScaleRule.LEAST_ERROR, ones())
    loud = torch.cat([x, torch.full((1, 192), loudest, device=DEVICE)])
    beside = QUANTIZE[output](loud, None, PLAIN, format, ScaleRule.LEAST_ERROR, ones())
    assert_same(numbers_of(beside, format)[:3], numbers_of(alone, format))


@each_output
def test_no_tokens_make_no_numbers(format: Format, output: torch.dtype):
    quantized = QUANTIZE[output](activations(0, 128), None, PLAIN, format, ScaleRule.CEIL, ones())
    assert quantized.values.shape == (0, 128) and quantized.values.dtype == output


@each_output
def test_rows_may_lie_anywhere_in_memory(format: Format, output: torch.dtype):
    wide = activations(5, 320).bfloat16()
    check(wide[:, 64:256], format, output, ScaleRule.LEAST_ERROR)
    check(wide[1::2, :192], format, output, ScaleRule.LEAST_ERROR)


@each_output
def test_groups_and_rows_of_zeros_stay_zeros(format: Format, output: torch.dtype):
    x = activations(4, 192)
    x[1] = 0
    x[2, 64:128] = 0
    usual = QUANTIZE[output](x, None, PLAIN, format, ScaleRule.LEAST_ERROR, ones())
    assert_same(numbers_of(usual, format), stored_as(round_input(x, format, ScaleRule.LEAST_ERROR, ones()), output))
    for quantized in (usual, check(x, format, output, ScaleRule.LEAST_ERROR)):
        if output == torch.int8:
            assert bool((quantized.scale[1] == 1).all()) and quantized.scale[2, 1] == 1


@each_output
@each_rule
@pytest.mark.parametrize("magnitude", [2.0**-140, 2.0**-126, 2.0**9, 2.0**122])
def test_tiny_and_huge_numbers_round_as_defined(format: Format, output: torch.dtype, rule: ScaleRule, magnitude: float):
    x = random(3, 128).clamp(-4, 4).to(DEVICE) * magnitude
    x[1] *= 2.0 ** torch.arange(0, -128, -1, device=DEVICE).clamp(min=-16)
    check(x, format, output, rule)


@each_output
@each_rule
def test_a_clip_ratio_above_one_may_not_overflow_and_a_small_one_saturates(
    format: Format, output: torch.dtype, rule: ScaleRule
):
    x = random(4, 128).to(DEVICE)
    x[:2] *= 2.0**125
    ratios = torch.tensor([2.0, 0.25], device=DEVICE)
    quantized = QUANTIZE[output](x, None, PLAIN, format, rule, ratios)
    wanted = round_input(x, format, rule, ratios.repeat_interleave(2)[:, None])
    assert_same(numbers_of(quantized, format), stored_as(wanted, output))


@each_output
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_makes_its_row_bad_and_no_other(format: Format, output: torch.dtype, bad: float):
    x = activations(3, 192)
    x[1, 70] = bad
    quantized = QUANTIZE[output](x, None, PLAIN, format, ScaleRule.LEAST_ERROR, ones())
    found = numbers_of(quantized, format)
    wanted = stored_as(round_input(x, format, ScaleRule.LEAST_ERROR, ones()), output)
    assert found.isnan().any(1).tolist() == [False, True, False]
    assert_same(found[::2], wanted[::2])
    if output == torch.float8_e4m3fn:
        assert bool(found[1].isnan().all())
        assert quantized.outside is None or not bool(quantized.outside.any())
    else:
        assert_same(found[1], wanted[1])


@each_output
def test_each_batch_entry_has_its_clip_ratio(format: Format, output: torch.dtype):
    x, ratios = activations(21, 128), torch.tensor([1.0, 0.5, 1.5], device=DEVICE)
    quantized = QUANTIZE[output](x, None, PLAIN, format, ScaleRule.LEAST_ERROR, ratios)
    wanted = round_input(x, format, ScaleRule.LEAST_ERROR, ratios.repeat_interleave(7)[:, None])
    assert_same(numbers_of(quantized, format), stored_as(wanted, output))
    with pytest.raises(ValueError, match="21 tokens"):
        QUANTIZE[output](x, None, PLAIN, format, ScaleRule.CEIL, ones(2))


@each_output
@pytest.mark.parametrize("scale", [1.0, 1.5, 1.125, 1.75])
def test_points_beside_the_middle_of_two_levels_fall_as_by_ieee_division(
    format: Format, output: torch.dtype, scale: float
):
    """The middles of levels times a scale, which the first number of the group fixes, and three
    floats either side.
    """
    levels = torch.tensor(format.levels) * scale
    middles = (levels[1:] + levels[:-1]) / 2
    points, above, below = [middles], middles, middles
    for _ in range(3):
        above, below = torch.nextafter(above, above * 2), torch.nextafter(below, below * 0)
        points += [above, below]
    points = torch.cat(points)
    rows = torch.zeros(7, format.group_size)
    rows[:, 0] = levels[-1]
    rows[:, 1 : 1 + 7] = points.view(7, 7)
    rows = torch.cat([rows * 2.0**exponent for exponent in range(-6, 5)] + [-rows]).to(DEVICE)
    check_at_one = QUANTIZE[output](rows, None, PLAIN, format, ScaleRule.CEIL, ones())
    wanted = stored_as(round_input(rows, format, ScaleRule.CEIL, ones()), output)
    assert_same(numbers_of(check_at_one, format), wanted)


@pytest.mark.parametrize("rule", [ScaleRule.CEIL, ScaleRule.LEAST_ERROR])
def test_rows_of_mxfp4_wider_than_fp8_are_told(rule: ScaleRule):
    format = FORMATS["mxfp4"]
    x = torch.full((4, 192), 4.0, device=DEVICE)
    x[1, 160:] = 2.0**-12  # the scale 2^-14 below the largest: still inside
    x[2, 160:] = 2.0**-13
    x[3, :64] = torch.inf
    x[3, 160:] = 2.0**-13
    quantized = quantize_to_fp8(x, None, PLAIN, format, rule, ones())
    assert quantized.outside.tolist() == [False, False, True, False]
    assert_same(numbers_of(quantized, format)[:2], round_input(x, format, rule, ones())[:2])
    for flags, outside in (([False, True], []), ([True, False], [2])):
        eight_bits = torch.tensor(flags, device=DEVICE)
        mixed = quantize_to_fp8(x, None, PLAIN, format, rule, ones(), eight_bits)
        assert mixed.outside.nonzero().flatten().tolist() == outside


@each_output
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_everything_is_written_and_nothing_beside_it(format: Format, output: torch.dtype, num_tokens: int):
    x, in_features = activations(num_tokens, 192).bfloat16(), 192
    whole, piece = [], []
    for tensor in empty_result(x, None, format, output):
        if tensor is None:
            piece.append(None)
            continue
        poison = torch.full((3 * tensor.numel(),), 0xFF, dtype=torch.uint8).repeat_interleave(tensor.element_size())
        whole.append(poison.to(DEVICE).view(3, *tensor.shape[:1], -1))
        flat = whole[-1][1].flatten()
        piece.append(flat.view(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype).view(tensor.shape))
    result = QuantizedInput(*piece)
    if result.outside is not None:
        result = result._replace(outside=result.outside.view(torch.bool))
    columns = torch.full((3, in_features), torch.nan, device=DEVICE)
    columns_launch(transform(in_features), format, ScaleRule.LEAST_ERROR, columns).run()
    quantize_launch(x, columns, transform(in_features), format, ScaleRule.LEAST_ERROR, ones(), None, result).run()
    for poison in whole:
        assert bool((poison[0] == 0xFF).all() and (poison[2] == 0xFF).all())
    wanted = QUANTIZE[output](x, None, transform(in_features), format, ScaleRule.LEAST_ERROR, ones())
    for found, expected in zip(result, wanted, strict=True):
        assert found is expected or torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_what_a_backend_does_not_hold_is_refused_by_name(format: Format):
    for dtype in set(QUANTIZE) - set(dtypes_of(format)):
        with pytest.raises(UnsupportedError, match=format.name):
            QUANTIZE[dtype](activations(1, 64), None, PLAIN, format, ScaleRule.CEIL, ones())
