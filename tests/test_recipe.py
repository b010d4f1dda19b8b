"""Recipes: one set of settings, round trips exactly, and says what is wrong with a wrong one."""

import dataclasses
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.errors import RecipeError
from tempoquant.formats import FORMATS, ScaleRule
from tempoquant.recipe import KEEP_16BIT, NEEDS, LayerRule, Recipe, builtin_recipes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

fractions = st.lists(st.sampled_from([0.1, 0.2, 0.33, 0.5, 0.7, 0.9]), unique=True, max_size=4).map(
    lambda f: tuple(sorted(f))
)
rules = st.one_of(
    st.builds(LayerRule, st.text(max_size=12), st.sampled_from([*FORMATS, KEEP_16BIT])),
    st.builds(LayerRule, st.text(max_size=12), st.sampled_from([*FORMATS, None]), st.integers(0, 300)),
)
counts = st.integers(1, 10**6)
recipes = st.builds(
    Recipe,
    name=st.text(min_size=1, max_size=12),
    format=st.sampled_from(sorted(FORMATS)),
    layers=st.lists(rules, max_size=3).map(tuple),
    keep_16bit_blocks=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    weight_scale_rule=st.sampled_from([rule.value for rule in ScaleRule]),
    activation_scale_rule=st.sampled_from([rule.value for rule in ScaleRule]),
    smoothing_alpha=st.none() | st.floats(0, 1),
    smoothing_statistic=st.sampled_from(["amax", "rms"]),
    rank=st.integers(1, 512),
    deflation=st.booleans(),
    centring=st.booleans(),
    gptq=st.just(True),  # without which act_order is refused
    act_order=st.booleans(),
    damping_fraction=st.floats(1e-6, 1),
    clip_ratios=st.lists(st.floats(0.1, 1.0), max_size=4).map(tuple),
    exponent_offsets=st.lists(st.integers(-2, 1), min_size=1, max_size=3).map(tuple),
    bin_fractions=fractions | st.dictionaries(st.sampled_from(["high_noise", "low_noise", "x.y"]), fractions),
    num_prompts=counts,
    num_steps=st.none() | counts,
    flow_shift=st.none() | st.floats(0.1, 20),
    height=st.none() | counts,
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
setting_names = st.sampled_from([field.name for field in dataclasses.fields(Recipe)])


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipes_load_and_survive_toml(name: str):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


def test_the_papers_recipe_and_the_two_floors_are_built_in():
    assert {"paper", "rtn", "svdquant"} <= set(builtin_recipes())


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4", "tiny"])
def test_the_default_recipe_has_a_twin_in_every_other_format_and_one_for_the_bundled_models(name: str):
    default, twin = Recipe.load("default"), Recipe.load(name)
    assert default.format == "nvfp4_m1" and twin.format == (name if name in FORMATS else default.format)
    same = {field.name for field in dataclasses.fields(Recipe)} - {"name", "rank" if name == "tiny" else "format"}
    assert all(getattr(twin, key) == getattr(default, key) for key in same)


@given(recipe=recipes)
def test_every_recipe_survives_toml(recipe: Recipe):
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@given(settings=st.dictionaries(setting_names, plain_values, max_size=4))
def test_any_settings_make_a_recipe_or_a_recipe_error(settings: dict):
    try:
        recipe = Recipe.from_dict({"name": "any", **settings})
    except RecipeError:
        return
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


@given(text=st.text(max_size=60))
def test_any_text_file_makes_a_recipe_or_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.mktemp("recipe") / "any.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(RecipeError):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rnak": 16}, ["'rnak'", "rank"]),
        ({"rank": "16"}, ["rank", "'16'"]),
        ({"rank": 16.5}, ["rank", "16.5"]),
        ({"rank": True}, ["rank", "True"]),
        ({"rank": -1}, ["rank", "-1"]),
        ({"gptq": 1}, ["gptq", "bool"]),
        ({"format": "fp5"}, ["'fp5'", "mxfp4"]),
        ({"format": KEEP_16BIT}, ["'16bit'"]),
        ({"name": 3}, ["name"]),
        ({"weight_scale_rule": "round"}, ["'round'", "floor", "least_error"]),
        ({"smoothing_statistic": "median"}, ["smoothing_statistic", "'median'", "rms"]),
        ({"deflation": True}, ["deflation", "rank"]),
        ({"centring": 1}, ["centring", "bool"]),
        ({"smoothing_alpha": 1.5}, ["smoothing_alpha", "1.5"]),
        ({"smoothing_alpha": float("nan")}, ["smoothing_alpha", "nan"]),
        ({"damping_fraction": 0}, ["damping_fraction"]),
        ({"damping_fraction": float("inf")}, ["damping_fraction", "inf"]),
        ({"flow_shift": float("inf")}, ["flow_shift", "inf"]),
        ({"flow_shift": 0}, ["flow_shift", "0"]),
        ({"prior_fraction": 1.0}, ["prior_fraction", "1.0"]),
        ({"block_inputs": "8bit"}, ["block_inputs", "'8bit'", "quantized"]),
        ({"clip_ratios": [2.5]}, ["clip ratio", "2.5"]),
        ({"clip_ratios": [0.0]}, ["clip ratio", "0.0"]),
        ({"clip_ratios": 0.9}, ["clip_ratios", "0.9"]),
        ({"clip_ratios": [0.9], "exponent_offsets": []}, ["exponent_offsets"]),
        ({"clip_ratios": [0.9], "exponent_offsets": [5000]}, ["5000"]),
        ({"bin_fractions": [0.7, 0.2]}, ["bin_fractions", "0.7"]),
        ({"bin_fractions": {"low_noise": [0.7, 0.2]}}, ["bin_fractions", "0.7"]),
        ({"bin_fractions": [0.5, 1.0]}, ["bin_fractions[1] should be less than 1, not 1.0."]),
        ({"bin_fractions": {"low_noise": [0]}}, ["bin_fractions.low_noise[0] should be greater than 0, not 0."]),
        ({"bin_fractions": {"low_noise": 0.5}}, ["bin_fractions.low_noise should be a list, not 0.5."]),
        ({"bin_fractions": 0.5}, ["bin_fractions should be a list, not 0.5."]),
        ({"bin_fractions_low_noise": [0.7, 0.2]}, ["bin_fractions", "0.7"]),
        ({"bin_fractions_high_noise": [1.0]}, ["bin_fractions.high_noise[0]", "1.0"]),
        ({"bin_fractions_high_noise": {"a": []}, "bin_fractions_low_noise": {"a": []}}, ["bin_fractions.high_noise"]),
        ({"bin_fractions": [], "bin_fractions_low_noise": []}, ["bin_fractions replaces bin_fractions_low_noise"]),
        ({"keep_16bit_blocks": [1]}, ["keep_16bit_blocks[1] is missing"]),
        ({"keep_16bit_blocks": [1, 2, 3]}, ["keep_16bit_blocks", "at most 2", "3"]),
        ({"keep_16bit_blocks": "12"}, ["keep_16bit_blocks should be a list, not '12'."]),
        ({"keep_16bit_blocks": [1, -1]}, ["keep_16bit_blocks", "-1"]),
        ({"num_steps": 0}, ["num_steps", "0"]),
        ({"layers": ["*"]}, ["layers holds tables with a pattern, and a format or a rank or both, not '*'."]),
        ({"layers": {"pattern": "*"}}, ["layers should be a list", "'pattern'"]),
        ({"layers": [{"format": "int4"}]}, ["layer rule {'format': 'int4'}", "pattern is missing"]),
        ({"layers": [{"pattern": "*"}]}, ["format"]),
        ({"layers": [{"pattern": "*", "format": "fp5"}]}, ["'fp5'"]),
        ({"layers": [{"pattern": 3, "format": "mxfp4"}]}, ["pattern", "3"]),
        ({"layers": [{"pattern": "*", "format": "mxfp4", "ranks": 3}]}, ["'ranks'", "'rank'"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_file(settings: dict, words: list[str]):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"name": "mine", **settings}, "recipe mine.toml")
    for word in ["recipe mine.toml", *words]:
        assert word in str(caught.value)


def test_a_recipe_without_a_name_says_what_to_add():
    with pytest.raises(RecipeError, match=r"name is missing: add it"):
        Recipe.from_dict({})


def test_integers_may_stand_for_floats_and_stay_floats():
    recipe = Recipe.from_dict({"name": "x", "smoothing_alpha": 1, "clip_ratios": [1]})
    assert isinstance(recipe.smoothing_alpha, float) and isinstance(recipe.clip_ratios[0], float)


def test_deflation_needs_a_rank_somewhere():
    assert Recipe("x", deflation=True, layers=(LayerRule("*", rank=2),)).deflation
    with pytest.raises(RecipeError, match="it needs a rank"):
        Recipe("x", deflation=True, layers=(LayerRule("*", rank=0),))


def test_bin_fractions_belong_to_their_denoiser():
    paper = Recipe.load("paper")
    assert paper.bin_fractions_of("high_noise") == (0.33, 0.66)
    assert paper.bin_fractions_of("low_noise") == (0.2, 0.7)


def test_one_list_of_bin_fractions_is_for_every_denoiser_and_a_mapping_leaves_the_others_one_bin():
    assert Recipe("x", bin_fractions=(0.5,)).bin_fractions_of("transformer") == (0.5,)
    assert Recipe("x", bin_fractions={"high_noise": (0.5,)}).bin_fractions_of("transformer") == ()


def test_bin_fractions_for_what_no_denoiser_is_called_are_refused():
    recipe = Recipe("x", bin_fractions={"high_noise": (0.5,), "low": (0.5,)})
    recipe.check_denoisers(["high_noise", "low", "transformer"], "some model")
    with pytest.raises(RecipeError, match=r"bin_fractions has 'low', but the denoisers of m are high_noise, low_noise"):
        recipe.check_denoisers(["high_noise", "low_noise"], "m")
    Recipe("x", bin_fractions=(0.5,)).check_denoisers(["transformer"], "m")


def old(high: list[float] | None = None, low: list[float] | None = None) -> Recipe:
    """Return a recipe as files and checkpoints had it when each denoiser's fractions had their own
    key.
    """
    keys = {"bin_fractions_high_noise": high, "bin_fractions_low_noise": low}
    return Recipe.from_dict({"name": "x", **{key: value for key, value in keys.items() if value is not None}})


def test_bin_fractions_with_a_key_for_each_expert_are_read_with_the_same_meaning():
    assert old([0.33, 0.66], [0.2, 0.7]) == Recipe("x", bin_fractions=Recipe.load("paper").bin_fractions)
    assert old([0.25, 0.5], [0.25, 0.5]) == Recipe("x", bin_fractions=(0.25, 0.5))
    assert [old(low=[0.5]).bin_fractions_of(name) for name in ("high_noise", "low_noise")] == [(), (0.5,)]
    assert old([], []) == old([]) == Recipe("x")


def test_samples_per_expert_is_read_as_samples_per_denoiser_and_not_beside_it():
    assert Recipe.from_dict({"name": "x", "samples_per_expert": 7}) == Recipe("x", samples_per_denoiser=7)
    with pytest.raises(RecipeError, match="samples_per_denoiser replaces samples_per_expert: give it alone"):
        Recipe.from_dict({"name": "x", "samples_per_expert": 7, "samples_per_denoiser": 7})


@pytest.mark.parametrize("bin_fractions", [(0.5,), {"high_noise": (0.5,)}])
def test_a_recipe_is_frozen_hashable_and_checked_when_it_is_made(bin_fractions: Any):
    recipe = Recipe("x", bin_fractions=bin_fractions)
    assert hash(recipe) == hash(Recipe("x", bin_fractions=bin_fractions))
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rank = 3  # type: ignore[misc]
    with pytest.raises(RecipeError, match="rank should be a valid integer, not '3'"):
        Recipe("x", rank="3", bin_fractions=bin_fractions)  # type: ignore[arg-type]


def test_clip_candidates_are_ratios_times_powers_of_two():
    recipe = Recipe("x", clip_ratios=(0.5, 1.0), exponent_offsets=(-1, 0, 1))
    assert recipe.clip_candidates() == (0.25, 0.5, 1.0, 0.5, 1.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, False),
        ({"rank": 16}, False),
        ({"gptq": True}, True),
        ({"weight_scale_rule": "least_error"}, False),
        ({"smoothing_alpha": 0.5}, True),
        ({"rank": 16, "deflation": True}, True),
        ({"centring": True}, True),
        ({"clip_ratios": (0.9,)}, True),
    ],
)
def test_a_recipe_needs_calibration_when_it_looks_at_activations(changes: dict, needs: bool):
    assert Recipe("x", **changes).needs_calibration is needs


def test_replace_checks_again():
    assert Recipe("x").replace(rank=4).rank == 4
    with pytest.raises(RecipeError, match="rank"):
        Recipe("x").replace(rank=-4)


def test_a_recipe_is_loaded_by_name_by_path_and_as_it_is(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(Recipe.load("paper").to_toml(), encoding="utf-8")
    assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.load("paper")
    assert Recipe.load(Recipe.load("paper")) is not None


@pytest.mark.parametrize("name", ["papr", "", "../paper", "recipes/paper", "mine.yaml"])
def test_an_unknown_name_lists_the_built_in_recipes(name: str):
    with pytest.raises(RecipeError, match=r"neither a built-in recipe \(.*paper.*\) nor a \.toml file"):
        Recipe.load(name)


def test_a_missing_file_and_broken_files_are_named(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"no recipe file .*gone\.toml"):
        Recipe.load(tmp_path / "gone.toml")
    for content in (b"name = ", b'name = "\xff"'):
        path = tmp_path / "broken.toml"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"broken\.toml"):
            Recipe.load(path)


@pytest.mark.parametrize(
    ("width", "num_bins", "by_bin"), [(256, 4, False), (1024, 4, True), (1024, 8, False), (5120, 8, True)]
)
def test_a_mean_for_each_bin_is_for_layers_where_it_takes_a_small_part(width: int, num_bins: int, by_bin: bool):
    assert Recipe.load("default").suited_to(width, width, num_bins).centring_by_bin is by_bin


@pytest.mark.parametrize(("switch", "needed"), NEEDS.items())
def test_a_switch_that_does_nothing_by_itself_is_refused(switch: str, needed: str):
    with pytest.raises(
        RecipeError, match=f"{switch} does nothing without {needed}: set {needed} = true, or {switch} ="
    ):
        Recipe.load("default").replace(**{"deflation_by_bin": switch == "deflation_by_bin", needed: False})


def test_a_deflation_by_bin_keeps_its_means_by_bin_whatever_they_take():
    recipe = Recipe.load("default").replace(deflation_by_bin=True)
    assert recipe.suited_to(64, 64, 8) == recipe
