"""Expanding a weight on the device is decoding it, number by number."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from tempoquant.errors import CheckpointError, UnsupportedError
from tempoquant.formats import (
    FORMATS,
    Format,
    ScaleRule,
    check_scale_bytes,
    decode,
    pack,
    scale_from_bytes,
    scale_to_bytes,
    to_codes,
    unpack,
    weight_scale,
)
from tempoquant.kernels.fp8_window import fp8_exact_rows
from tempoquant.kernels.reference import WeightTensors, dequantize_residual
from tempoquant.kernels.triton_expand import expand_to_bf16, expand_to_fp8, expand_to_int8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((1, 1), (5, 3), (33, 7))  # outputs and groups of 64
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
each_fp8_format = pytest.mark.parametrize("format", [FORMATS["mxfp4"], FORMATS["nvfp4_m1"]], ids=lambda each: each.name)
each_shape = pytest.mark.parametrize(("num_rows", "num_groups"), SHAPES)


def weight_tensors(format: Format, weight: torch.Tensor) -> WeightTensors:
    scale = weight_scale(weight, format, ScaleRule.CEIL)
    return stored(
        format,
        to_codes(weight, scale.effective, format),
        scale.group,
        scale.tensor if format.has_tensor_scale else None,
    )


def stored(
    format: Format, codes: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor | None
) -> WeightTensors:
    packed, stored_scale = pack(codes, format).to(DEVICE), scale_to_bytes(scale, format).to(DEVICE)
    return WeightTensors(packed, stored_scale, None if tensor_scale is None else tensor_scale.to(DEVICE))


def random_weight(num_rows: int, in_features: int) -> torch.Tensor:
    """Return channels of very different size, a group of zeros, and where there are two, a row of
    zeros.
    """
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_rows, in_features, generator=generator)
    weight *= torch.randn(in_features, generator=generator).exp()
    weight[0, :64] = 0
    weight[1:2] = 0
    return weight


def poisoned(num_rows: int, in_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a buffer of NaN, or of −128 in int8, and the piece of it, not at its start, that is to
    be written.
    """
    whole = torch.full((3, num_rows, in_features), -128 if dtype == torch.int8 else torch.nan, device=DEVICE).to(dtype)
    return whole, whole[1]


def is_poison(values: torch.Tensor) -> torch.Tensor:
    return values == -128 if values.dtype == torch.int8 else values.float().isnan()


@each_fp8_format
@each_shape
def test_in_fp8_values_times_row_scale_are_the_weight(format: Format, num_rows: int, num_groups: int):
    tensors = weight_tensors(format, random_weight(num_rows, 64 * num_groups))
    assert bool(fp8_exact_rows(tensors, format).all())
    whole, out = poisoned(num_rows, 64 * num_groups, torch.float8_e4m3fn)
    values, row_scale = expand_to_fp8(tensors, format, out)
    assert values.data_ptr() == out.data_ptr() and row_scale.shape == (num_rows,)
    # The tensor scale is the only factor that is no power of two: multiplied last, as in the
    # reference.
    base = row_scale if tensors.tensor_scale is None else row_scale / tensors.tensor_scale
    mantissa, _ = torch.frexp(base)
    assert bool((mantissa == 0.5).all())
    wanted = dequantize_residual(tensors._replace(tensor_scale=None), format)
    assert torch.equal(values.float() * base[:, None], wanted)
    assert bool(is_poison(whole[0]).all() and is_poison(whole[2]).all())


@each_format
@each_shape
def test_in_bf16_values_are_the_weight_without_its_tensor_scale(format: Format, num_rows: int, num_groups: int):
    tensors = weight_tensors(format, random_weight(num_rows, 64 * num_groups))
    whole, out = poisoned(num_rows, 64 * num_groups, torch.bfloat16)
    values = expand_to_bf16(tensors, format, out)
    exact = dequantize_residual(tensors._replace(tensor_scale=None), format)
    assert torch.equal(values, exact.bfloat16())
    if not format.has_integer_levels:
        assert torch.equal(values.float(), exact)
    assert bool(is_poison(whole[0]).all() and is_poison(whole[2]).all())


@each_shape
def test_in_int8_values_are_the_codes_and_scales_those_stored(num_rows: int, num_groups: int):
    format = FORMATS["int4"]
    tensors = weight_tensors(format, random_weight(num_rows, 64 * num_groups))
    whole, out = poisoned(num_rows, 64 * num_groups, torch.int8)
    values, scale = expand_to_int8(tensors, format, out)
    assert torch.equal(values, unpack(tensors.packed, format))
    assert torch.equal(scale, scale_from_bytes(tensors.scale, format))
    assert bool(is_poison(whole[0]).all() and is_poison(whole[2]).all())


def is_valid(stored_scale: torch.Tensor, format: Format) -> bool:
    with contextlib.suppress(CheckpointError):
        check_scale_bytes(stored_scale, format, "the test")
        return True
    return False


@each_format
def test_every_code_times_every_scale_that_can_be_stored_is_decoded(format: Format):
    """Rows of one scale each, so that FP8 holds them too."""
    num_bytes = format.scale_grid.num_bytes
    every = torch.arange(0, 2 ** (8 * num_bytes), 1 if num_bytes == 1 else 97)
    every = every.to(torch.uint8)[:, None] if num_bytes == 1 else every.to(torch.int16)[:, None].view(torch.uint8)
    scale = torch.stack([scale_from_bytes(row, format) for row in every if is_valid(row[None], format)])
    codes = torch.arange(-7, 8, dtype=torch.int8).repeat(8)[: format.group_size].expand(scale.shape[0], -1)
    packed = pack(codes, format).to(DEVICE)
    tensors = WeightTensors(packed, scale_to_bytes(scale, format).to(DEVICE))
    wanted = decode(codes, format) * scale
    assert torch.equal(expand_to_bf16(tensors, format).cpu(), wanted.bfloat16())
    if format.is_fp8_exact:
        values, row_scale = expand_to_fp8(tensors, format)
        assert torch.equal((values.float() * row_scale[:, None]).cpu(), wanted)


def test_the_byte_that_no_code_is_stored_as_is_read_as_the_definition_reads_it():
    for format in FORMATS.values():
        packed = torch.arange(256, dtype=torch.uint8).view(-1, format.group_size // 2)
        scale = scale_to_bytes(torch.ones(packed.shape[0], 1), format)
        tensors = WeightTensors(packed.to(DEVICE), scale.to(DEVICE))
        assert torch.equal(expand_to_bf16(tensors, format).cpu().float(), decode(unpack(packed, format), format))


@pytest.mark.parametrize(("octaves", "fits"), [(14, True), (15, False)])
def test_a_row_of_mxfp4_fits_when_its_scales_span_fifteen_octaves(octaves: int, fits: bool):
    format = FORMATS["mxfp4"]
    scale = torch.tensor([[1.0, 2.0**-octaves], [1.0, 1.0]])
    codes = torch.arange(64, dtype=torch.int8).remainder(15).sub(7).expand(2, -1)
    tensors = stored(format, codes, scale, None)
    assert fp8_exact_rows(tensors, format).tolist() == [fits, True]
    values, row_scale = expand_to_fp8(tensors, format)
    is_exact = (values.float() * row_scale[:, None] == dequantize_residual(tensors, format)).all(1)
    assert is_exact.tolist() == [fits, True]


def test_a_group_of_zeros_does_not_count_among_the_octaves_below():
    format = FORMATS["mxfp4"]
    codes = torch.arange(64, dtype=torch.int8).remainder(15).sub(7).expand(1, -1).clone()
    codes[:, 32:] = 0
    tensors = stored(format, codes, torch.tensor([[2.0**20, 1.0]]), None)
    assert bool(fp8_exact_rows(tensors, format).all())
    values, row_scale = expand_to_fp8(tensors, format)
    assert torch.equal(values.float() * row_scale[:, None], dequantize_residual(tensors, format))


@pytest.mark.parametrize("name", ["nvfp4", "int4"])
def test_formats_that_fp8_does_not_hold_are_refused_by_name(name: str):
    format = FORMATS[name]
    tensors = weight_tensors(format, random_weight(2, 64))
    with pytest.raises(UnsupportedError, match=name):
        expand_to_fp8(tensors, format)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "nvfp4_m1"])
def test_formats_whose_levels_are_no_integers_are_refused_in_int8(name: str):
    format = FORMATS[name]
    tensors = weight_tensors(format, random_weight(2, 64))
    with pytest.raises(UnsupportedError, match=name):
        expand_to_int8(tensors, format)


def test_a_buffer_of_another_shape_is_refused():
    format = FORMATS["mxfp4"]
    tensors = weight_tensors(format, random_weight(2, 64))
    with pytest.raises(ValueError, match="does not fit"):
        expand_to_bf16(tensors, format, torch.empty(2, 128, dtype=torch.bfloat16, device=DEVICE))
