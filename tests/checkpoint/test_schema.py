"""Laws of quantization_config: what it holds survives JSON, and whatever it does not know is
refused.
"""

import copy
import dataclasses
import json
from typing import Any

import pytest

from tempoquant.checkpoint import FORMAT_VERSION, ComponentConfig, LayerEntry
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.checkpoint.schema import MAX_EDGES, MAX_FEATURES
from tempoquant.errors import CheckpointError
from tempoquant.formats import FORMATS, MXFP4, Format, ScaleRule
from tempoquant.recipe import NEEDS, Recipe, builtin_recipes
from tempoquant.timesteps import TimestepBins
from tests.quantized_wan import BINS, CALIBRATION, RECIPE

ENTRY = LayerEntry(
    MXFP4, ScaleRule.CEIL, in_features=128, out_features=64, rank=4, smoothed=True, bias="bfloat16", deflated=True,
    centred=True,
)  # fmt: skip
CONFIG = ComponentConfig(
    denoiser="low_noise",
    bins=BINS,
    layers={"blocks.0.ffn.net.2": ENTRY, "blocks.0.attn1.to_out.0": ENTRY},
    recipe=RECIPE,
    library_version="0.1.0",
    calibration=CALIBRATION,
    notes=("blocks.0.ffn.net.2: Hessian in float64",),
    weight_sha256={"diffusion_pytorch_model.safetensors": "0" * 64},
    magnitude_ratios=MagnitudeRatios((900.0, 450.0), {"conditional": (1.0, 1.05), "unconditional": (1.0, 0.95)}),
)


OPTIONAL = ("weight_sha256", "magnitude_ratios")


def plain() -> dict[str, Any]:
    return json.loads(json.dumps(CONFIG.to_dict()))


def altered(path: str, value: Any) -> dict[str, Any]:
    """Return the config with one value replaced; the path's parts are separated by slashes."""
    config = plain()
    *parents, last = path.split("/")
    record = config
    for parent in parents:
        record = record[parent]
    record[last] = value
    return config


def test_a_config_survives_json() -> None:
    assert ComponentConfig.from_dict(plain()).to_dict() == CONFIG.to_dict()


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_builtin_recipe_survives_json(name: str) -> None:
    config = altered("recipe", json.loads(json.dumps(Recipe.load(name).to_dict())))
    assert ComponentConfig.from_dict(config).recipe == Recipe.load(name)


def test_a_recipe_stored_with_a_key_for_each_experts_bins_is_read_with_the_same_meaning() -> None:
    recipe = {
        "name": "paper", "format": "mxfp4", "layers": [], "keep_16bit_blocks": [0, 0], "weight_scale_rule": "floor",
        "activation_scale_rule": "ceil", "smoothing_alpha": 0.5, "smoothing_statistic": "amax", "rank": 16,
        "deflation": False, "deflation_by_bin": False, "rotation": False, "prior_fraction": 0.0, "centring": False,
        "centring_by_bin": False, "gptq": True, "act_order": False, "damping_fraction": 0.01, "block_size": 128,
        "clip_ratios": [0.6, 0.7, 0.8, 0.9, 1.0], "exponent_offsets": [-1, 0, 1], "clip_search_tokens_per_bin": 256,
        "bin_fractions_high_noise": [0.33, 0.66], "bin_fractions_low_noise": [0.2, 0.7], "share_smoothing": False,
        "statistics_branches": "conditional", "block_inputs": "16bit", "num_prompts": 12,
    }  # fmt: skip
    parsed = ComponentConfig.from_dict(altered("recipe", recipe))
    assert parsed.recipe == Recipe.load("paper")
    assert ComponentConfig.from_dict(json.loads(json.dumps(parsed.to_dict()))) == parsed


def test_a_component_of_an_older_recording_has_no_magnitude_ratios() -> None:
    config = plain()
    del config["magnitude_ratios"]
    parsed = ComponentConfig.from_dict(config)
    assert parsed.magnitude_ratios is None and "magnitude_ratios" not in parsed.to_dict()


def test_a_component_may_have_no_calibration_and_no_bins() -> None:
    config = altered("calibration", None) | {"timestep_edges": []}
    parsed = ComponentConfig.from_dict(config)
    assert parsed.calibration is None and parsed.bins == TimestepBins()


def test_layers_are_written_in_one_order() -> None:
    backwards = copy.deepcopy(plain())
    backwards["layers"] = dict(reversed(backwards["layers"].items()))
    assert json.dumps(ComponentConfig.from_dict(backwards).to_dict()) == json.dumps(CONFIG.to_dict())


@pytest.mark.parametrize("key", [key for key in CONFIG.to_dict() if key not in OPTIONAL])
def test_a_missing_key_is_named(key: str) -> None:
    config = plain()
    del config[key]
    with pytest.raises(CheckpointError, match=key):
        ComponentConfig.from_dict(config)


@pytest.mark.parametrize("key", ENTRY.to_dict())
def test_a_missing_key_of_a_layer_is_named_with_its_layer(key: str) -> None:
    config = plain()
    del config["layers"]["blocks.0.ffn.net.2"][key]
    with pytest.raises(CheckpointError, match=f"blocks.0.ffn.net.2: '{key}'"):
        ComponentConfig.from_dict(config)


def test_a_newer_version_says_upgrade_before_anything_else_is_looked_at() -> None:
    with pytest.raises(CheckpointError, match=f"{FORMAT_VERSION + 1}, newer than .* upgrade tempoquant"):
        ComponentConfig.from_dict({"quant_method": "tempoquant", "format_version": FORMAT_VERSION + 1, "new": []})


BY_BIN = ("centred_by_bin", "deflated_by_bin")
LATEST = ("weights_alone",)
SINCE = {
    1: ("deflated", "centred", "rotated", *BY_BIN, *LATEST),
    2: ("rotated", *BY_BIN, *LATEST),
    3: (*BY_BIN, *LATEST),
    5: LATEST,
}
"""Version to what it did not know."""


def of_version(version: int) -> dict[str, Any]:
    """Return the config as it was written before deflation, centring, rotation and tensors by
    timestep bin existed.
    """
    config = plain() | {"format_version": version}
    for entry in config["layers"].values():
        for key in SINCE[version]:
            del entry[key]
    num_known = {1: 0, 2: 3}.get(version, 5)
    for key in ("deflation", "centring", "smoothing_statistic", "act_order", "rotation")[num_known:]:
        config["recipe"].pop(key, None)
    return config


@pytest.mark.parametrize(("switch", "needed"), NEEDS.items())
def test_a_stored_switch_that_did_nothing_is_read_as_off(switch: str, needed: str) -> None:
    config = plain()
    config["recipe"] |= {switch: True, needed: False}
    assert getattr(ComponentConfig.from_dict(config).recipe, switch) is False


@pytest.mark.parametrize("version", SINCE)
def test_an_old_version_is_read_as_having_nothing_that_it_did_not_know(version: int) -> None:
    parsed = ComponentConfig.from_dict(of_version(version))
    old = dataclasses.replace(ENTRY, **dict.fromkeys(SINCE[version], False))
    assert parsed == dataclasses.replace(CONFIG, layers=dict.fromkeys(CONFIG.layers, old))
    assert parsed.to_dict()["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize(
    ("version", "keys"),
    [
        (1, ("deflated",)),
        (1, ("centred",)),
        (1, ("deflated", "centred")),
        (1, ("rotated",)),
        (2, ("rotated",)),
        (3, ("centred_by_bin",)),
        (3, ("deflated_by_bin",)),
        (5, ("weights_alone",)),
    ],
)
def test_an_old_version_cannot_say_what_it_did_not_know(version: int, keys: tuple[str, ...]) -> None:
    config = of_version(version)
    config["layers"]["blocks.0.ffn.net.2"] |= dict.fromkeys(keys, False)
    wanted = f"blocks.0.ffn.net.2: unknown key '{keys[0]}' in format version {version}"
    with pytest.raises(CheckpointError, match=wanted):
        ComponentConfig.from_dict(config)


WRONG = [
    ("quant_method", "gguf"),
    ("quant_method", None),
    ("format_version", 0),
    ("format_version", True),
    ("format_version", "1"),
    ("format_version", 1.0),
    ("library_version", 3),
    ("library_version", "x" * 5000),
    ("expert", "../transformer"),
    ("expert", []),
    ("timestep_edges", None),
    ("timestep_edges", [900, 800]),
    ("timestep_edges", [float("nan")]),
    ("timestep_edges", [True]),
    ("timestep_edges", ["900"]),
    ("timestep_edges", [-1.0]),
    ("timestep_edges", [i / MAX_EDGES for i in range(MAX_EDGES + 1)]),
    ("layers", []),
    ("layers", {"": ENTRY.to_dict()}),
    ("layers", {"../up": ENTRY.to_dict()}),
    ("layers", {"a..b": ENTRY.to_dict()}),
    ("layers", {"a.b\n": ENTRY.to_dict()}),
    ("layers", {"a": None}),
    ("layers/blocks.0.ffn.net.2/format", "nf4"),
    ("layers/blocks.0.ffn.net.2/format", ["mxfp4"]),
    ("layers/blocks.0.ffn.net.2/activation_scale_rule", "round"),
    ("layers/blocks.0.ffn.net.2/in_features", 127),
    ("layers/blocks.0.ffn.net.2/in_features", 0),
    ("layers/blocks.0.ffn.net.2/in_features", -128),
    ("layers/blocks.0.ffn.net.2/in_features", 128.0),
    ("layers/blocks.0.ffn.net.2/in_features", True),
    ("layers/blocks.0.ffn.net.2/in_features", 2 * MAX_FEATURES),
    ("layers/blocks.0.ffn.net.2/out_features", 10**30),
    ("layers/blocks.0.ffn.net.2/rank", -1),
    ("layers/blocks.0.ffn.net.2/rank", 65),
    ("layers/blocks.0.ffn.net.2/smoothed", 1),
    ("layers/blocks.0.ffn.net.2/rank", 0),  # deflated
    ("layers/blocks.0.ffn.net.2/deflated", 1),
    ("layers/blocks.0.ffn.net.2/centred", None),
    ("layers/blocks.0.ffn.net.2/bias", None),  # centred
    ("layers/blocks.0.ffn.net.2/centred_by_bin", 1),
    ("layers/blocks.0.ffn.net.2/deflated_by_bin", "all"),
    ("layers/blocks.0.ffn.net.2/deflated_by_bin", True),  # centred, and not by bin
    ("layers/blocks.0.ffn.net.2", ENTRY.to_dict() | {"centred": False, "centred_by_bin": True}),
    (
        "layers/blocks.0.ffn.net.2",
        ENTRY.to_dict() | {"deflated": False, "centred_by_bin": True, "deflated_by_bin": True},
    ),
    ("layers/blocks.0.ffn.net.2/bias", "float8_e4m3fn"),
    ("layers/blocks.0.ffn.net.2/bias", True),
    ("layers/blocks.0.ffn.net.2/zero_point", 0),
    ("recipe", "paper"),
    ("recipe/colour", "red"),
    ("recipe/rank", -1),
    ("recipe/layers", [{"pattern": "*", "format": ["mxfp4"]}]),
    ("calibration", []),
    ("calibration/prompts", {}),
    ("calibration/prompts", [{"id": "a"}]),
    ("calibration/prompts", [{"id": 1, "prompt": "", "image_sha256": ""}]),
    ("calibration/settings", None),
    ("calibration/host", "here"),
    ("notes", "one"),
    ("notes", [1]),
    ("weight_sha256", []),
    ("weight_sha256", {"a.safetensors": "0" * 63}),
    ("weight_sha256", {"a.safetensors": "G" * 64}),
    ("comment", "hello"),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=[f"{path}={str(value)[:20]}" for path, value in WRONG])
def test_a_wrong_value_is_refused_in_one_short_message(path: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        ComponentConfig.from_dict(altered(path, value), "here/config.json")
    message = str(caught.value)
    assert message.startswith("here/config.json") and len(message) < 700 and message.endswith((".", ")"))


@pytest.mark.parametrize("config", [None, [], "tempoquant", 1, {}, {"quant_method": ["tempoquant"]}])
def test_what_is_no_config_at_all_is_refused(config: Any) -> None:
    with pytest.raises(CheckpointError):
        ComponentConfig.from_dict(config)


def test_provenance_of_absurd_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match="calibration"):
        ComponentConfig.from_dict(altered("calibration/settings", {"log": "x" * (17 * 2**20)}))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("rule", ScaleRule)
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize(("centred", "bias"), [(False, None), (False, "bfloat16"), (True, "float32")])
@pytest.mark.parametrize("by_bin", [False, True])
def test_an_entry_survives_json(
    format: Format, rule: ScaleRule, deflated: bool, centred: bool, bias: str | None, by_bin: bool
) -> None:
    entry = LayerEntry(
        format, rule, 128, 3, rank=2 if deflated else 0, smoothed=False, bias=bias, deflated=deflated, centred=centred,
        centred_by_bin=by_bin and centred, deflated_by_bin=by_bin and deflated,
    )  # fmt: skip
    assert LayerEntry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry
