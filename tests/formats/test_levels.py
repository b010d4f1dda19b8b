"""Numbers to codes and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.formats import FORMATS, Format, decode, encode

ALL_CODES = torch.arange(-7, 8, dtype=torch.int8)
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def midpoints(format: Format, dtype: torch.dtype) -> torch.Tensor:
    levels = torch.tensor(format.levels, dtype=dtype)
    return (levels[1:] + levels[:-1]) / 2


@each_format
@each_dtype
def test_decode_then_encode_returns_the_codes(format: Format, dtype: torch.dtype):
    assert torch.equal(encode(decode(ALL_CODES, format, dtype), format), ALL_CODES)


@each_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_levels_are_exact_in_every_float_dtype(format: Format, dtype: torch.dtype):
    wanted = [-level for level in format.levels[:0:-1]] + list(format.levels)
    assert decode(ALL_CODES, format, dtype).tolist() == wanted


@each_format
@each_dtype
def test_ties_go_to_the_even_code(format: Format, dtype: torch.dtype):
    ties = midpoints(format, dtype)
    even = torch.tensor([code if code % 2 == 0 else code + 1 for code in range(7)], dtype=torch.int8)
    assert torch.equal(encode(ties, format), even)
    assert torch.equal(encode(-ties, format), -even)


@each_format
@each_dtype
def test_the_smallest_step_off_a_tie_decides(format: Format, dtype: torch.dtype):
    ties, codes = midpoints(format, dtype), torch.arange(7, dtype=torch.int8)
    above, below = torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)
    assert torch.equal(encode(above, format), codes + 1)
    assert torch.equal(encode(below, format), codes)


@each_format
@each_dtype
def test_overflow_saturates(format: Format, dtype: torch.dtype):
    huge = torch.tensor([format.top_level * 1.01, torch.finfo(dtype).max, torch.inf], dtype=dtype)
    assert encode(huge, format).tolist() == [7, 7, 7]
    assert encode(-huge, format).tolist() == [-7, -7, -7]


@each_format
def test_both_zeros_have_code_zero(format: Format):
    assert encode(torch.tensor([0.0, -0.0]), format).tolist() == [0, 0]


@each_format
@given(values=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30))
def test_no_level_is_nearer_than_the_chosen_one(format: Format, values: list[float]):
    x = torch.tensor(values, dtype=torch.float32)
    levels = decode(ALL_CODES, format, torch.float64)
    nearest = (x.double()[:, None] - levels).abs().amin(1)
    assert torch.equal((x.double() - decode(encode(x, format), format, torch.float64)).abs(), nearest)


@each_format
@given(values=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30))
def test_encoding_is_odd_and_monotone(format: Format, values: list[float]):
    x = torch.tensor(values, dtype=torch.float32).sort().values
    codes = encode(x, format)
    assert torch.equal(encode(-x, format), -codes)
    assert bool((codes.diff() >= 0).all())


@each_format
def test_shape_is_kept_even_when_empty(format: Format):
    assert encode(torch.zeros(2, 0, 3), format).shape == (2, 0, 3)
    assert decode(torch.zeros(0, dtype=torch.int8), format).shape == (0,)
