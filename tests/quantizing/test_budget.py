"""Laws of a budget: kept to the byte, spent where it helps, and never against the recipe's own
rules.
"""

from collections import Counter

import pytest

from tempoquant.calibrate.sensitivity import LayerSensitivity, LinearsSensitivity
from tempoquant.calibrate.sensitivity_file import Sensitivity
from tempoquant.errors import RecipeError
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS
from tempoquant.planning.block_costs import DenoiserCosts
from tempoquant.planning.layer_sizes import LayerSizes
from tempoquant.quantizing.budget import Budget, BudgetPlan
from tempoquant.recipe import LayerRule, Recipe

TINY = SourceModel.open("tiny")
OURS = Recipe.load("default").replace(rank=2)
SHARED = (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v"))
ALONE = (("attn1.to_out.0",), ("attn2.to_q",), ("attn2.to_out.0",), ("ffn.net.0.proj",), ("ffn.net.2",))


def linears(block: int, names: tuple[str, ...], loudness: float) -> LinearsSensitivity:
    errors = {rank: loudness * 0.9**rank for rank in (0, 2, 8, 32)}
    return {f"blocks.{block}.{name}": LayerSensitivity(1.0, errors) for name in names}


def sensitivity(low_noise: float = 10.0) -> Sensitivity:
    """Make a sensitivity that rises with the block's number; low noise has a much higher one than
    high noise.
    """
    denoisers = {
        denoiser: [linears(block, names, loudness * 2**block) for block in range(4) for names in (*SHARED, *ALONE)]
        for denoiser, loudness in (("high_noise", 1.0), ("low_noise", low_noise))
    }
    return Sensitivity(denoisers, {})


def spend(budget: Budget, recipe: Recipe = OURS, low_noise: float = 10.0) -> Recipe:
    return BudgetPlan(TINY, recipe, budget).spend(sensitivity(low_noise))


def bits_per_weight(recipe: Recipe) -> float:
    all_sizes = [LayerSizes(TINY, denoiser, recipe) for denoiser in COMPONENTS]
    num_bytes = sum(sizes.as_recipe_says(name).replacing for sizes in all_sizes for name in sizes)
    return 8 * num_bytes / sum(sizes.num_weights(name) for sizes in all_sizes for name in sizes)


def size_gib(recipe: Recipe) -> float:
    costs = [DenoiserCosts(TINY, denoiser, recipe, 0, "cpu") for denoiser in COMPONENTS]
    return sum(cost.output_bytes for cost in costs) / 2**30


@pytest.mark.parametrize("bits", [4.8, 5.0, 6.5, 12.0])
def test_bits_per_weight_are_never_exceeded_and_nearly_used_up(bits: float) -> None:
    assert bits - 0.3 < bits_per_weight(spend(Budget(bits_per_weight=bits))) <= bits


@pytest.mark.parametrize("share", [1.001, 1.3, 1.9])
def test_a_size_is_never_exceeded_and_nearly_used_up(share: float) -> None:
    size = size_gib(OURS) * share
    assert 0.95 * size < size_gib(spend(Budget(size_gib=size))) <= size


def test_the_expert_and_the_blocks_that_matter_more_get_more() -> None:
    recipe = spend(Budget(bits_per_weight=5.5))
    totals = {
        (denoiser, block): sum(recipe.rank_of(f"blocks.{block}.{name}", denoiser) for [name] in ALONE)
        for denoiser in COMPONENTS
        for block in (0, 3)
    }
    high, low = "high_noise", "low_noise"
    assert totals[high, 0] < totals[high, 3] and totals[low, 0] < totals[low, 3]
    assert totals[high, 0] < totals[low, 0]


def test_linears_that_share_an_input_get_one_rank() -> None:
    recipe = spend(Budget(bits_per_weight=5.2))
    for denoiser in COMPONENTS:
        for block in range(4):
            for names in SHARED:
                assert len({recipe.rank_of(f"blocks.{block}.{name}", denoiser) for name in names}) == 1


def test_the_recipes_own_rules_stay_whatever_the_budget() -> None:
    own = (LayerRule("low_noise.*.ffn.*", rank=1), LayerRule("blocks.0.attn2.to_q", "int4"))
    recipe = spend(Budget(bits_per_weight=8.0), OURS.replace(layers=own, keep_16bit_blocks=(0, 1)))
    assert recipe.layers[:2] == own and recipe.keep_16bit_blocks == (0, 1)
    assert not any(".3." in rule.pattern or "low_noise.blocks.1.ffn" in rule.pattern for rule in recipe.layers[2:])
    assert recipe.rank_of("blocks.2.ffn.net.2", "low_noise") == 1
    assert bits_per_weight(recipe) <= 8.0


def test_a_rule_is_made_only_where_the_recipe_says_something_else() -> None:
    ranks = Counter(rule.rank for rule in spend(Budget(bits_per_weight=5.0)).layers)
    assert ranks and OURS.rank not in ranks


def test_a_large_budget_buys_layers_in_16_bits() -> None:
    kept = [rule.pattern for rule in spend(Budget(bits_per_weight=12.0)).layers if rule.format == "16bit"]
    assert kept and sum(name.startswith("low_noise") for name in kept) > len(kept) / 2


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            {"bits_per_weight": 4.0},
            r"too small: without any low-rank branch, recipe default takes 4\.\d+ bits a weight",
        ),
        ({"size_gib": 0.001}, r"too small: .* takes 0\.\d+ GiB"),
        ({"bits_per_weight": 16.0}, "16 bits a weight hold the model in 16 bits"),
        ({"size_gib": 5.0}, r"holds every layer in 16 bits, which takes 0\.\d+ GiB: give less"),
        ({"bits_per_weight": float("nan")}, "above 0 and finite"),
        ({}, "give one of the two"),
        ({"bits_per_weight": 5.0, "size_gib": 1.0}, "give one of the two"),
    ],
)
def test_a_budget_that_cannot_be_is_one_sentence(budget: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        BudgetPlan(TINY, OURS, Budget(**budget))


def test_a_budget_needs_activations_and_something_to_decide() -> None:
    with pytest.raises(RecipeError, match="recipe rtn looks at none"):
        BudgetPlan(TINY, Recipe.load("rtn"), Budget(5.0))
    with pytest.raises(RecipeError, match="nothing is left for a budget"):
        BudgetPlan(TINY, OURS.replace(layers=(LayerRule("*", rank=3),)), Budget(5.0))


def test_a_sensitivity_that_lacks_a_layer_is_refused() -> None:
    lacking = Sensitivity({**sensitivity().denoisers, "low_noise": []}, {})
    with pytest.raises(RecipeError, match=r"lacks blocks\.0\.\S+ of low_noise: measure it again"):
        BudgetPlan(TINY, OURS, Budget(5.0)).spend(lacking)
