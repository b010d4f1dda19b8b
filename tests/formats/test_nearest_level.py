"""Rounding by addition is the search among thresholds that the standard describes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.errors import RecipeError
from tempoquant.formats import FORMATS, Format, ScaleGrid, decode, encode, nearest_level

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def codes_by_threshold(scaled: torch.Tensor, format: Format) -> torch.Tensor:
    """Return codes by the definition: a midpoint belongs to the even code, so below an odd one the
    threshold is the number under it.
    """
    levels = torch.tensor(format.levels, dtype=scaled.dtype)
    midpoints = (levels[1:] + levels[:-1]) / 2
    below = torch.nextafter(midpoints, torch.zeros_like(midpoints))
    thresholds = torch.where(torch.arange(7) % 2 == 0, midpoints, below)
    magnitude = torch.bucketize(scaled.abs(), thresholds).to(torch.int8)
    return torch.where(scaled < 0, -magnitude, magnitude)


def agree(scaled: torch.Tensor, format: Format) -> None:
    codes = codes_by_threshold(scaled, format)
    assert torch.equal(encode(scaled, format), codes)
    level = nearest_level(scaled, format)
    assert level.dtype == scaled.dtype
    assert torch.equal(level, decode(codes, format, scaled.dtype))
    assert not bool((torch.signbit(level) & (level == 0)).any())  # −0 is no level: stored bytes would differ


@each_format
@each_dtype
def test_rounding_by_addition_gives_the_code_of_the_thresholds_everywhere_near_them(
    format: Format, dtype: torch.dtype
) -> None:
    levels = torch.tensor(format.levels, dtype=dtype)
    centres = torch.cat((levels, (levels[1:] + levels[:-1]) / 2, levels[-1:] * 1.5))
    near = [centres]
    for _ in range(3):
        near.append(torch.nextafter(near[-1], torch.full_like(centres, torch.inf)))
    for _ in range(3):
        near.append(torch.nextafter(near[-1] if len(near) > 4 else centres, torch.full_like(centres, -torch.inf)))
    both_signs = torch.cat((*near, *(-x for x in near)))
    agree(both_signs, format)


@each_format
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_rounding_by_addition_gives_the_code_of_the_thresholds_for_any_float(
    format: Format, values: list[float]
) -> None:
    agree(torch.tensor(values, dtype=torch.float32), format)
    agree(torch.tensor(values, dtype=torch.float64), format)


@each_format
def test_rounding_leaves_its_argument_alone_and_keeps_nan(format: Format) -> None:
    scaled = torch.tensor([0.3, torch.nan, -2.6])
    before = scaled.clone()
    assert torch.isnan(nearest_level(scaled, format)).tolist() == [False, True, False]
    torch.testing.assert_close(scaled, before, rtol=0, atol=0, equal_nan=True)


def test_levels_that_are_no_floating_point_system_are_refused() -> None:
    uneven = Format("uneven", (0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 9.0), 16, ScaleGrid.BF16)
    with pytest.raises(RecipeError, match="no floating-point system"):
        encode(torch.ones(4), uneven)
