"""Laws of what a recipe does to each linear of a block, format and rank."""

from collections.abc import Mapping
from pathlib import Path

from tempoquant.calibrate.denoiser_model import linear_groups
from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sequential import quantize_denoiser
from tempoquant.layer import QuantizedLayer
from tempoquant.recipe import LayerRule, Recipe
from tests.calibrate.test_sequential import BINS, ToyTransformer, samples

OURS = Recipe.load("default").replace(rank=4)


def quantized(recipe: Recipe, folder: Path) -> Mapping[str, QuantizedLayer]:
    blocks = quantize_denoiser(ToyTransformer(), samples(), recipe, BINS, HiddenStates(folder))
    return {named.name: named.layer for block in blocks for named in block.layers}


def test_linears_that_read_one_input_share_it_where_they_get_the_same_rank() -> None:
    recipe = OURS.replace(layers=(LayerRule("*.0.gate", rank=2), LayerRule("*.down", "16bit")))
    groups = [linear_groups(ToyTransformer(), index, recipe) for index in (0, 1)]
    assert [list(group) for group in groups] == [[("up",), ("gate",)], [("up", "gate")]]
    assert [choice.rank for choice in groups[0].values()] == [4, 2]
    apart = linear_groups(ToyTransformer(), 1, recipe.replace(share_smoothing=False))
    assert list(apart) == [("up",), ("gate",)]


def test_each_layer_gets_the_rank_of_its_rule_and_none_has_no_branch(tmp_path: Path) -> None:
    rules = (LayerRule("low_noise.blocks.1.down", rank=0), LayerRule("blocks.2.*", rank=7))
    layers = quantized(OURS.replace(layers=rules), tmp_path)
    ranks = {name: layer.rank for name, layer in layers.items()}
    assert ranks == {name: 0 if name == "blocks.1.down" else 7 if ".2." in name else 4 for name in ranks}
    assert layers["blocks.1.down"].branch is None
    assert layers["blocks.2.down"].branch.deflation is not None


def test_a_rank_by_rule_is_the_same_as_the_recipes_own(tmp_path: Path) -> None:
    """Rules only say which rank: a recipe whose every layer has a rule is the one that needs
    none.
    """
    by_rule = quantized(OURS.replace(rank=1, layers=(LayerRule("*", rank=4),)), tmp_path / "rule")
    own = quantized(OURS, tmp_path / "own")
    assert all(by_rule[name].packed.equal(own[name].packed) for name in own)
    assert all(by_rule[name].branch.up.equal(own[name].branch.up) for name in own)
