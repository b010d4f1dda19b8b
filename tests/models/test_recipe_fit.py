"""A recipe that a model cannot be quantized with is refused before any work."""

import pytest

from tempoquant.errors import RecipeError
from tempoquant.models.recipe_fit import check_recipe_fits
from tempoquant.recipe import LayerRule, Recipe
from tests.recorded import SOURCE

PAPER = Recipe.load("paper")


@pytest.mark.parametrize("name", ["default", "paper", "rtn", "svdquant"])
def test_every_built_in_recipe_fits_the_bundled_model(name: str) -> None:
    check_recipe_fits(SOURCE, Recipe.load(name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 257}, "rank 257 exceeds the smaller side"),
        ({"layers": (LayerRule("low_noise.*.ffn.*", rank=258),)}, "rank 258 exceeds the smaller side"),
        ({"layers": (LayerRule("transformer.blocks.0.*", "16bit"),)}, "matches no layer"),
        ({"bin_fractions": {"high": (0.5,)}}, "has 'high', but the denoisers of .* are high_noise, low_noise"),
        ({"layers": (LayerRule("*", "16bit"),)}, "nothing to quantize"),
        ({"keep_16bit_blocks": (4, 0)}, "nothing to quantize"),
        ({"keep_16bit_blocks": (99, 99)}, "nothing to quantize"),
    ],
)
def test_a_recipe_that_cannot_fit_is_refused_before_any_work(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_recipe_fits(SOURCE, PAPER.replace(**changes))
