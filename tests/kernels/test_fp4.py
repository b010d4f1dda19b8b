"""The backend fp4: inputs are packed as weights are stored, and the product of packed operands
rounds once.
"""

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.errors import UnsupportedError
from tempoquant.formats import (
    FORMATS,
    INT4,
    Format,
    ScaleRule,
    from_codes,
    group_amax,
    group_scale,
    pack,
    scale_from_bytes,
    scale_to_bytes,
    to_codes,
    unpack,
)
from tempoquant.kernels.fp4 import fp4_multiply
from tempoquant.kernels.quantize_to import quantize_to_fp4
from tempoquant.kernels.quantized_input import QuantizedInput
from tempoquant.kernels.reference import WeightTensors, dequantize_residual, round_input
from tests.kernels.products import branch, poisoned_memory, whole_numbers
from tests.kernels.rounded_inputs import DEVICE, PLAIN, activations, assert_same, ones, transform
from tests.random_layers import random

pytestmark = pytest.mark.usefixtures(poisoned_memory.__name__)
__all__ = ["poisoned_memory"]

each_format = pytest.mark.parametrize(
    "format", [format for format in FORMATS.values() if format is not INT4], ids=lambda format: format.name
)


def numbers_of(quantized: QuantizedInput, format: Format) -> torch.Tensor:
    """Decode packed codes and scales, (tokens, in) float32."""
    scale = scale_from_bytes(quantized.scale.view(torch.uint8), format)
    return from_codes(unpack(quantized.values, format), scale, format)


@each_format
@pytest.mark.parametrize("rule", ScaleRule)
def test_the_numbers_are_the_definitions(format: Format, rule: ScaleRule) -> None:
    for num_tokens, in_features, rotated in ((33, 192, True), (5, 160, False)):
        of = transform(in_features, rotated=rotated)
        x = activations(num_tokens, in_features).bfloat16()
        x[0] = 0
        x[2] *= 2.0**9
        quantized = quantize_to_fp4(x, None, of, format, rule, 0.9 * ones())
        wanted = round_input(of.quantizer_input(x.float(), None), format, rule, 0.9 * ones())
        assert_same(numbers_of(quantized, format), wanted)


@each_format
def test_every_code_and_scale_lies_where_a_checkpoint_has_it(format: Format) -> None:
    """Index by index: two codes a byte, the even feature low; the scales of a row side by side, one
    byte a group.
    """
    x = activations(6, 192)
    quantized = quantize_to_fp4(x, None, PLAIN, format, ScaleRule.CEIL, ones())
    scale = group_scale(group_amax(x, format), format, ScaleRule.CEIL)
    assert torch.equal(quantized.scale.view(torch.uint8), scale_to_bytes(scale, format))
    packed = pack(to_codes(x, scale, format), format)
    negative_zeros = (quantized.values & 0xF == 8) | (quantized.values >> 4 == 8)
    assert torch.equal(quantized.values[~negative_zeros], packed[~negative_zeros])
    assert torch.equal(unpack(quantized.values, format), unpack(packed, format))


@each_format
def test_a_bad_number_makes_no_other_row_bad(format: Format) -> None:
    x = activations(3, 192)
    x[1, 70] = torch.nan
    quantized = quantize_to_fp4(x, None, PLAIN, format, ScaleRule.LEAST_ERROR, ones())
    scales = quantized.scale.view(torch.uint8)
    is_nan = scales == 255 if quantized.scale.dtype == torch.uint8 else quantized.scale.float().isnan()
    assert is_nan.any(1).tolist() == [False, True, False]


@each_format
@pytest.mark.parametrize(("shape", "rank"), [((1, 16, 64), 0), ((129, 144, 288), 3), ((67, 272, 576), 33)], ids=str)
def test_packed_whole_numbers_are_multiplied_without_error_and_rounded_once(
    format: Format, shape: tuple[int, int, int], rank: int
) -> None:
    num_tokens, num_outputs, num_inner = shape
    hidden, up = branch(num_tokens, num_outputs, rank)
    bias = whole_numbers(num_outputs, largest=100, seed=5).bfloat16().to(DEVICE)
    operands = []
    for rows, seed in ((num_tokens, 1), (num_outputs, 2)):
        codes = whole_numbers(rows, num_inner, largest=7, seed=seed).to(torch.int8).to(DEVICE)
        scale = torch.exp2(whole_numbers(rows, num_inner // format.group_size, largest=2, seed=seed + 2)).to(DEVICE)
        wide = torch.full((rows, num_inner // 2 + 16), 0x7F, dtype=torch.uint8, device=DEVICE)
        wide[:, 8:-8] = pack(codes, format)
        operands.append((wide[:, 8:-8], scale_to_bytes(scale, format)))
    (values, scale), (packed, weight_scale) = operands
    tensor_scale = torch.tensor(0.375, device=DEVICE) if format.has_tensor_scale else None
    weight = WeightTensors(packed, weight_scale, tensor_scale, up, bias)
    stored = scale.view(torch.float8_e4m3fn) if format.scale_grid.is_e4m3 else scale
    quantized = QuantizedInput(values, stored, hidden, None)
    y = fp4_multiply(quantized, weight, format, torch.bfloat16)
    wanted = numbers_of(quantized, format).double() @ dequantize_residual(weight, format, torch.float64).T
    if hidden is not None and up is not None:
        wanted += hidden.double() @ up.double().T
    assert torch.equal(y, (wanted + bias.double()).bfloat16())


def test_what_is_no_code_is_refused() -> None:
    x = random(2, 64).to(DEVICE)
    with pytest.raises(UnsupportedError, match="int4"):
        quantize_to_fp4(x, None, PLAIN, INT4, ScaleRule.CEIL, ones())
    with pytest.raises(UnsupportedError, match="eight bits"):
        quantize_to_fp4(x, None, PLAIN, FORMATS["nvfp4"], ScaleRule.CEIL, ones(), True)
