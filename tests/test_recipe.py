"""Recipes: one set of settings, round trips exactly, and says what is wrong with a wrong one."""

import dataclasses
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempoquant.errors import RecipeError
from tempoquant.formats import FORMATS, INT4, MXFP4, NVFP4, ScaleRule
from tempoquant.recipe import KEEP_16BIT, NEEDS, LayerRule, Recipe, builtin_recipes
from tempoquant.timesteps import Expert

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
    bin_fractions_high_noise=fractions,
    bin_fractions_low_noise=fractions,
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
        ({"clip_ratios": [2.5]}, ["clip ratio", "2.5"]),
        ({"clip_ratios": [0.0]}, ["clip ratio", "0.0"]),
        ({"clip_ratios": 0.9}, ["clip_ratios", "0.9"]),
        ({"clip_ratios": [0.9], "exponent_offsets": []}, ["exponent_offsets"]),
        ({"clip_ratios": [0.9], "exponent_offsets": [5000]}, ["5000"]),
        ({"bin_fractions_low_noise": [0.7, 0.2]}, ["bin fractions", "0.7"]),
        ({"bin_fractions_high_noise": [1.0]}, ["bin fractions", "1.0"]),
        ({"keep_16bit_blocks": [1]}, ["keep_16bit_blocks", "1"]),
        ({"keep_16bit_blocks": [1, -1]}, ["keep_16bit_blocks", "-1"]),
        ({"num_steps": 0}, ["num_steps", "0"]),
        ({"layers": ["*"]}, ["layers", "pattern"]),
        ({"layers": [{"pattern": "*"}]}, ["format"]),
        ({"layers": [{"pattern": "*", "format": "fp5"}]}, ["'fp5'"]),
        ({"layers": [{"pattern": 3, "format": "mxfp4"}]}, ["pattern", "3"]),
        ({"layers": [{"pattern": "*", "format": "mxfp4", "ranks": 3}]}, ["ranks"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_file(settings: dict, words: list[str]):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"name": "mine", **settings}, "recipe mine.toml")
    for word in ["recipe mine.toml", *words]:
        assert word in str(caught.value)


def test_a_recipe_without_a_name_says_what_to_add():
    with pytest.raises(RecipeError, match=r"has no name: add name ="):
        Recipe.from_dict({})


def test_integers_may_stand_for_floats_and_stay_floats():
    recipe = Recipe.from_dict({"name": "x", "smoothing_alpha": 1, "clip_ratios": [1]})
    assert isinstance(recipe.smoothing_alpha, float) and isinstance(recipe.clip_ratios[0], float)


def test_the_first_matching_layer_rule_wins():
    recipe = Recipe("x", layers=(LayerRule("*.to_q", "int4"), LayerRule("*attn1*", "16bit"), LayerRule("*", "nvfp4")))
    formats = [
        recipe.format_of(f"blocks.3.{layer}", Expert.LOW_NOISE, 3, 9) for layer in ("attn1.to_q", "attn1.to_k", "ffn")
    ]
    assert formats == [INT4, None, NVFP4]


def test_a_layer_rule_may_name_the_expert():
    recipe = Recipe("x", layers=(LayerRule("high_noise.*", "nvfp4"),))
    assert recipe.format_of("blocks.0.q", Expert.HIGH_NOISE, 0, 1) is NVFP4
    assert recipe.format_of("blocks.0.q", Expert.LOW_NOISE, 0, 1) is MXFP4


def test_patterns_tell_capitals_apart_and_match_whole_names():
    assert not LayerRule("BLOCKS.*", "int4").matches("blocks.0.q", Expert.LOW_NOISE)
    assert not LayerRule("blocks.1", "int4").matches("blocks.1.q", Expert.LOW_NOISE)


def test_a_rule_may_give_a_rank_and_leave_the_format_to_the_recipe():
    recipe = Recipe("x", rank=3, layers=(LayerRule("low_noise.*.q", rank=0), LayerRule("*.k", "int4", 7)))
    assert recipe.format_of("blocks.0.q", Expert.LOW_NOISE, 0, 1) is MXFP4
    ranks = {name: recipe.rank_of(f"blocks.0.{name}", Expert.LOW_NOISE) for name in "qkv"}
    assert ranks == {"q": 0, "k": 7, "v": 3}
    assert recipe.rank_of("blocks.0.q", Expert.HIGH_NOISE) == 3


def test_deflation_needs_a_rank_somewhere():
    assert Recipe("x", deflation=True, layers=(LayerRule("*", rank=2),)).deflation
    with pytest.raises(RecipeError, match="it needs a rank"):
        Recipe("x", deflation=True, layers=(LayerRule("*", rank=0),))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "says nothing: give it a format or a rank"),
        ({"rank": -1}, "rank is a count, not -1"),
        ({"rank": 1.5}, "rank is a count, not 1.5"),
        ({"rank": True}, "rank is a count, not True"),
        ({"format": KEEP_16BIT, "rank": 2}, "a layer in 16bit has no rank"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict({"name": "x", "layers": [{"pattern": "*", **rule}]})


@given(first=st.integers(0, 6), last=st.integers(0, 6), num_blocks=st.integers(1, 8))
def test_the_first_and_last_blocks_stay_in_16_bits_whatever_a_rule_says(first: int, last: int, num_blocks: int):
    recipe = Recipe("x", keep_16bit_blocks=(first, last), layers=(LayerRule("*", "int4"),))
    quantized = [i for i in range(num_blocks) if recipe.format_of(f"blocks.{i}.q", Expert.LOW_NOISE, i, num_blocks)]
    assert quantized == list(range(first, num_blocks - last))


def test_bin_fractions_belong_to_their_expert():
    paper = Recipe.load("paper")
    assert paper.bin_fractions(Expert.HIGH_NOISE) == (0.33, 0.66)
    assert paper.bin_fractions(Expert.LOW_NOISE) == (0.2, 0.7)


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
