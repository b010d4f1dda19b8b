"""A linear's stored size, added up, is the denoiser's."""

import pytest

from tempoquant.models.wan.family import COMPONENTS
from tempoquant.planning.block_costs import DenoiserCosts
from tempoquant.planning.layer_sizes import LayerSizes
from tempoquant.recipe import LayerRule, Recipe
from tests.recorded import SOURCE

OURS = Recipe.load("default").replace(rank=2)
RULES = (LayerRule("low_noise.*.ffn.*", rank=8), LayerRule("*.1.attn1.*", "16bit"), LayerRule("*.attn2.to_q", "int4"))


@pytest.mark.parametrize("name", ["default", "paper", "rtn", "svdquant"])
@pytest.mark.parametrize("denoiser", list(COMPONENTS))
def test_another_recipe_changes_the_size_of_an_expert_by_that_of_its_linears(name: str, denoiser: str) -> None:
    plain = Recipe.load(name)
    recipe = plain.replace(layers=RULES, keep_16bit_blocks=(1, 0))

    def rest(recipe: Recipe) -> int:
        """Return the bytes of a denoiser outside its linears."""
        sizes = LayerSizes(SOURCE, denoiser, recipe)
        whole = DenoiserCosts(SOURCE, denoiser, recipe, 0, "cpu").output_bytes
        return whole - sum(sizes.as_recipe_says(linear).on_disk for linear in sizes)

    assert rest(recipe) == rest(plain)


def test_a_budget_may_decide_over_layers_that_no_rule_names_in_blocks_that_get_four_bits() -> None:
    recipe = OURS.replace(layers=RULES, keep_16bit_blocks=(1, 0))
    sizes = LayerSizes(SOURCE, "low_noise", recipe)
    free = {name for name in sizes if sizes.is_free(name)}
    assert free == {f"blocks.{i}.{name}" for i in (1, 2, 3) for name in (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    ) if (i, name[:5]) != (1, "attn1")}  # fmt: skip


def test_a_larger_rank_takes_more_and_16_bits_take_most() -> None:
    sizes = LayerSizes(SOURCE, "low_noise", OURS)
    ranks = [sizes.at_rank("blocks.0.ffn.net.0.proj", rank) for rank in (0, 2, 32)]
    assert ranks == sorted(ranks) and ranks[-1] < sizes.in_16_bits("blocks.0.ffn.net.0.proj")
