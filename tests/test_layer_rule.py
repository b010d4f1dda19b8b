"""Layer rules: what they match, which one holds, and what a wrong one is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.errors import RecipeError
from tempoquant.formats import INT4, MXFP4, NVFP4
from tempoquant.recipe import KEEP_16BIT, LayerRule, Recipe


def test_the_first_matching_layer_rule_wins():
    recipe = Recipe("x", layers=(LayerRule("*.to_q", "int4"), LayerRule("*attn1*", "16bit"), LayerRule("*", "nvfp4")))
    formats = [
        recipe.format_of(f"blocks.3.{layer}", "low_noise", 3, 9) for layer in ("attn1.to_q", "attn1.to_k", "ffn")
    ]
    assert formats == [INT4, None, NVFP4]


def test_a_layer_rule_may_name_the_denoiser():
    recipe = Recipe("x", layers=(LayerRule("high_noise.*", "nvfp4"),))
    assert recipe.format_of("blocks.0.q", "high_noise", 0, 1) is NVFP4
    assert recipe.format_of("blocks.0.q", "low_noise", 0, 1) is MXFP4


def test_patterns_tell_capitals_apart_and_match_whole_names():
    assert not LayerRule("BLOCKS.*", "int4").matches("blocks.0.q", "low_noise")
    assert not LayerRule("blocks.1", "int4").matches("blocks.1.q", "low_noise")


def test_a_rule_may_give_a_rank_and_leave_the_format_to_the_recipe():
    recipe = Recipe("x", rank=3, layers=(LayerRule("low_noise.*.q", rank=0), LayerRule("*.k", "int4", 7)))
    assert recipe.format_of("blocks.0.q", "low_noise", 0, 1) is MXFP4
    ranks = {name: recipe.rank_of(f"blocks.0.{name}", "low_noise") for name in "qkv"}
    assert ranks == {"q": 0, "k": 7, "v": 3}
    assert recipe.rank_of("blocks.0.q", "high_noise") == 3


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "is empty: give it a format or a rank"),
        ({"rank": -1}, "rank should be greater than or equal to 0, not -1"),
        ({"rank": 1.5}, "rank should be a valid integer, not 1.5"),
        ({"rank": True}, "rank should be a valid integer, not True"),
        ({"format": KEEP_16BIT, "rank": 2}, "a layer in 16bit has no rank"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict({"name": "x", "layers": [{"pattern": "*", **rule}]})


@given(first=st.integers(0, 6), last=st.integers(0, 6), num_blocks=st.integers(1, 8))
def test_the_first_and_last_blocks_stay_in_16_bits_whatever_a_rule_says(first: int, last: int, num_blocks: int):
    recipe = Recipe("x", keep_16bit_blocks=(first, last), layers=(LayerRule("*", "int4"),))
    quantized = [i for i in range(num_blocks) if recipe.format_of(f"blocks.{i}.q", "low_noise", i, num_blocks)]
    assert quantized == list(range(first, num_blocks - last))
