"""Formats are values, and wrong ones cannot be made."""

import dataclasses

import pytest

from tempoquant.errors import RecipeError
from tempoquant.formats import FORMATS, INT4, MXFP4, NVFP4, NVFP4_M1, Format, ScaleGrid, get_format

E2M1_BITS = [(exponent, mantissa) for exponent in range(4) for mantissa in range(2)]


def test_e2m1_levels_are_what_the_bits_say():
    """OCP MX v1.0: bias 1; exponent 0 is subnormal."""
    values = tuple(m / 2 if e == 0 else (1 + m / 2) * 2 ** (e - 1) for e, m in E2M1_BITS)
    assert MXFP4.levels == NVFP4.levels == NVFP4_M1.levels == values


def test_int4_levels_are_the_whole_numbers():
    assert INT4.levels == tuple(range(8))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_format_is_found_by_its_name(format: Format):
    assert get_format(format.name) is format


def test_only_formats_with_e4m3_scales_have_a_tensor_scale():
    assert [name for name, format in FORMATS.items() if format.has_tensor_scale] == ["nvfp4", "nvfp4_m1"]
    assert [grid for grid in ScaleGrid if grid.is_e4m3] == [ScaleGrid.E4M3, ScaleGrid.E4M1]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_the_first_candidate_of_every_format_is_the_scale_that_amax_asks_for(format: Format):
    assert format.scale_candidates[0] == 1 and len(set(format.scale_candidates)) == len(format.scale_candidates) > 1


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"'fp5'.*int4, mxfp4, nvfp4, nvfp4_m1"):
        get_format("fp5")


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": (0.0, 1.0)},
        {"levels": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)},
        {"levels": (0.0, 2.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0)},
        {"levels": (0.0, 1.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0)},
        {"group_size": 0},
        {"group_size": 1},
        {"group_size": 33},
        {"group_size": 48},
        {"scale_candidates": ()},
        {"scale_candidates": (0.5, 1.0)},
        {"scale_candidates": (1.0, 0.0)},
        {"scale_candidates": (1.0, -0.5)},
    ],
)
def test_a_wrong_format_cannot_be_made(wrong: dict):
    with pytest.raises(RecipeError, match="mxfp4"):
        dataclasses.replace(MXFP4, **wrong)


def test_groups_that_do_not_divide_the_features_are_refused_with_layer_numbers_and_remedy():
    assert MXFP4.num_groups(96) == 3
    with pytest.raises(RecipeError, match=r"blocks\.0\.q has in_features = 100.*32.*16 bits"):
        MXFP4.num_groups(100, "blocks.0.q")


def test_scales_take_one_byte_but_bfloat16():
    assert [grid for grid in ScaleGrid if grid.num_bytes != 1] == [ScaleGrid.BF16]
    assert ScaleGrid.BF16.num_bytes == 2
