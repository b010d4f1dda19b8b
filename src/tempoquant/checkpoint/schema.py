"""The schema of `quantization_config` in a component's config.json, checked strictly.

Every value may come from someone else: an unknown key, a wrong type or an absurd size raises a
CheckpointError that names the key and the remedy. Nothing is guessed. docs/checkpoint.md documents
each key.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tempoquant.checkpoint.checks import REMEDY, check_keys, check_name, check_text, damaged, require
from tempoquant.checkpoint.hardly_seen import MAX_FEATURES, MAX_LAYERS, hardly_seen_from_dict, hardly_seen_to_dict
from tempoquant.checkpoint.magnitude_ratios import MagnitudeRatios
from tempoquant.checkpoint.model_call import ModelCall
from tempoquant.errors import CheckpointError, TempoQuantError
from tempoquant.formats import FORMATS, Format, ScaleRule
from tempoquant.layer import HardlySeen
from tempoquant.recipe import NEEDS, Recipe
from tempoquant.timesteps import TimestepBins
from tempoquant.validation import shorten

QUANT_METHOD = "tempoquant"
FORMAT_VERSION = (
    6  # 1 knew no deflation or centring, 2 no rotation, 3 no tensors by bin, 4 no model_call, 5 no modulation
)
BIAS_DTYPES = ("bfloat16", "float16", "float32")

MAX_EDGES = 1000
MAX_JSON_BYTES = 16 * 2**20  # of calibration, and of the whole config.json


@dataclass(frozen=True)
class LayerEntry:
    """The facts that fix presence, dtype and shape of every tensor of one layer.

    Attributes:
        format: of weight and activations.
        activation_scale_rule: how activation scales follow from a group.
        in_features, out_features: of the linear.
        rank: of the low-rank branch, 0 for none.
        smoothed: whether there is a smoothing factor.
        bias: its dtype's name, or None for no bias.
        deflated: whether the branch's part is subtracted from the input.
        centred: whether there is an input offset; then there is a bias.
        rotated: whether the smoothed input and the residual weight are rotated in blocks.
        centred_by_bin: whether input offset and bias differ by timestep bin.
        deflated_by_bin: whether the branch's up and deflation differ by timestep bin; then an input
            offset does too.
        weights_alone: whether the input is not rounded; then nothing else is done to it.
    """

    format: Format
    activation_scale_rule: ScaleRule
    in_features: int
    out_features: int
    rank: int
    smoothed: bool
    bias: str | None
    deflated: bool = False
    centred: bool = False
    rotated: bool = False
    centred_by_bin: bool = False
    deflated_by_bin: bool = False
    weights_alone: bool = False

    def __post_init__(self) -> None:
        for key in ("in_features", "out_features"):
            require(0 < getattr(self, key) <= MAX_FEATURES, key, f"lies in 1 … {MAX_FEATURES}", getattr(self, key))
        require(
            self.in_features % self.format.group_size == 0, "in_features",
            f"is a multiple of {self.format.name}'s group size {self.format.group_size}", self.in_features,
        )  # fmt: skip
        limit = min(self.in_features, self.out_features)
        require(0 <= self.rank <= limit, "rank", f"lies in 0 … min(in, out) = {limit}", self.rank)
        require(self.rank > 0 or not self.deflated, "deflated", "needs a rank above 0", self.deflated)
        require(self.bias is not None or not self.centred, "centred", "needs a bias", self.centred)
        require(self.bias is None or self.bias in BIAS_DTYPES, "bias", f"is null or one of {BIAS_DTYPES}", self.bias)
        require(self.centred or not self.centred_by_bin, "centred_by_bin", "needs centred", True)
        fits = not self.deflated_by_bin or (self.deflated and self.centred_by_bin == self.centred)
        require(fits, "deflated_by_bin", "needs deflated, and centred_by_bin where centred", True)
        changed = self.rank > 0 or self.smoothed or self.centred or self.rotated
        require(not (self.weights_alone and changed), "weights_alone", "needs an input that nothing is done to", True)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format.name, "activation_scale_rule": self.activation_scale_rule.value,
            "in_features": self.in_features, "out_features": self.out_features, "rank": self.rank,
            "smoothed": self.smoothed, "deflated": self.deflated, "deflated_by_bin": self.deflated_by_bin,
            "centred": self.centred, "centred_by_bin": self.centred_by_bin, "rotated": self.rotated,
            "weights_alone": self.weights_alone, "bias": self.bias,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, entry: Any) -> "LayerEntry":
        check_keys(entry, set(cls.__dataclass_fields__))
        for key in ("in_features", "out_features", "rank"):
            require(type(entry[key]) is int, key, "is a whole number", entry[key])
        for key in _SWITCHES:
            require(type(entry[key]) is bool, key, "is true or false", entry[key])
        rules = [rule.value for rule in ScaleRule]
        for key, known in (
            ("format", sorted(FORMATS)),
            ("activation_scale_rule", rules),
            ("bias", [None, *BIAS_DTYPES]),
        ):
            require(entry[key] in known, key, f"is one of {known}", entry[key])
        rule = ScaleRule(entry["activation_scale_rule"])
        return cls(**{**entry, "format": FORMATS[entry["format"]], "activation_scale_rule": rule})


@dataclass(frozen=True)
class Calibration:
    """The data that the component was calibrated on.

    Attributes:
        prompts: records {"id", "prompt", "image_sha256"}, see `tempoquant.prompts.provenance`.
        settings: how the samples were drawn; any JSON.
    """

    prompts: tuple[Mapping[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"prompts": [dict(prompt) for prompt in self.prompts], "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, record: Any) -> "Calibration":
        check_keys(record, {"prompts", "settings"})
        require(isinstance(record["prompts"], list), "prompts", "is a list", record["prompts"])
        for prompt in record["prompts"]:
            check_keys(prompt, {"id", "prompt", "image_sha256"})
            for key, value in prompt.items():
                require(isinstance(value, str), key, "is a text", value)
        require(isinstance(record["settings"], dict), "settings", "is an object", record["settings"])
        return cls(tuple(record["prompts"]), record["settings"])


@dataclass(frozen=True)
class ComponentConfig:
    """The content of one component's `quantization_config`.

    Attributes:
        denoiser: the denoiser that the component replaces.
        bins: its timestep bins.
        layers: the 4-bit layers by module name.
        recipe: the resolved recipe.
        library_version: of the TempoQuant that wrote the component.
        calibration: provenance, or None if the recipe needed none.
        notes: notes that the run stores, such as a Hessian that needed float64.
        weight_sha256: hexadecimal SHA-256 of each weight file; empty if the writer did not know
            them (diffusers' own save_pretrained rewrites the files, so a hash of the old ones must
            not survive it).
        hardly_seen: layers with input features that were almost silent in calibration, by name.
        call: how the model is called; None if a version before 5 did not say.
        magnitude_ratios: the ratios that its recording measured, for step caches; None for none.
    """

    denoiser: str
    bins: TimestepBins
    layers: Mapping[str, LayerEntry]
    recipe: Recipe
    library_version: str
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    weight_sha256: Mapping[str, str] = field(default_factory=dict)
    hardly_seen: Mapping[str, HardlySeen] = field(default_factory=dict)
    call: ModelCall | None = None
    magnitude_ratios: MagnitudeRatios | None = None

    def to_dict(self, with_hashes: bool = True) -> dict[str, Any]:
        """Return plain JSON values, the inverse of `from_dict`."""
        config = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "library_version": self.library_version,
            "expert": self.denoiser,
            "timestep_edges": list(self.bins.edges),
            "layers": {name: entry.to_dict() for name, entry in sorted(self.layers.items())},
            "recipe": self.recipe.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "notes": list(self.notes),
        }
        if self.call is not None:
            config["model_call"] = self.call.to_dict()
        if self.magnitude_ratios is not None:
            config["magnitude_ratios"] = self.magnitude_ratios.to_dict()
        if self.hardly_seen:
            config["hardly_seen"] = hardly_seen_to_dict(self.hardly_seen)
        if with_hashes and self.weight_sha256:
            config["weight_sha256"] = dict(sorted(self.weight_sha256.items()))
        return config

    @classmethod
    def from_dict(cls, config: Any, where: str = "quantization_config") -> "ComponentConfig":
        """Check and parse a config. Raises CheckpointError that starts with `where`."""
        try:
            return _parse(config)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        except TempoQuantError as error:  # the recipe's, the format's or the bins' own checks
            raise CheckpointError(f"{where}: {error} {REMEDY}") from error
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(f"{where} is malformed ({error})") from error


def _parse(config: Any) -> ComponentConfig:
    require(isinstance(config, dict), "quantization_config", "is an object", config)
    method = config.get("quant_method")
    require(method == QUANT_METHOD, "quant_method", f"is {QUANT_METHOD!r}", method)
    _check_version(config.get("format_version"))
    check_keys(config, {
        "quant_method", "format_version", "library_version", "expert", "timestep_edges", "layers", "recipe",
        "calibration", "notes",
    }, optional={"weight_sha256", "hardly_seen", "model_call", "magnitude_ratios"})  # fmt: skip
    check_text("library_version", config["library_version"])
    name = config["expert"]
    require(isinstance(name, str) and name.isidentifier(), "expert", "is the name of a denoiser", name)
    require(isinstance(config["recipe"], dict), "recipe", "is an object", config["recipe"])
    require(isinstance(config["notes"], list), "notes", "is a list of texts", config["notes"])
    for note in config["notes"]:
        check_text("notes", note)
    calibration = config["calibration"]
    size = len(json.dumps(calibration))
    require(size <= MAX_JSON_BYTES, "calibration", f"is at most {MAX_JSON_BYTES} bytes of JSON", size)
    return ComponentConfig(
        denoiser=config["expert"],
        bins=_bins(config["timestep_edges"]),
        layers=_layers(config["layers"], config["format_version"]),
        recipe=_recipe(config["recipe"]),
        library_version=config["library_version"],
        calibration=None if calibration is None else Calibration.from_dict(calibration),
        notes=tuple(config["notes"]),
        weight_sha256=_hashes(config.get("weight_sha256", {})),
        hardly_seen=hardly_seen_from_dict(config.get("hardly_seen", {})),
        call=ModelCall.from_dict(config["model_call"]) if "model_call" in config else None,
        magnitude_ratios=MagnitudeRatios.from_dict(ratios) if (ratios := config.get("magnitude_ratios")) else None,
    )


def _recipe(settings: dict[str, Any]) -> Recipe:
    """Read the recipe; older recipes may hold switches without effect, which are refused today."""
    idle = {key for key, needed in NEEDS.items() if settings.get(key) is True and settings.get(needed, False) is False}
    return Recipe.from_dict({key: value for key, value in settings.items() if key not in idle}, "recipe")


def _check_version(version: Any) -> None:
    require(type(version) is int and version > 0, "format_version", "is a whole number above 0", version)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"format_version is {version}, newer than the {FORMAT_VERSION} this TempoQuant reads: upgrade tempoquant."
        )


def _bins(edges: Any) -> TimestepBins:
    is_list = isinstance(edges, list) and len(edges) <= MAX_EDGES
    require(is_list, "timestep_edges", f"is a list of at most {MAX_EDGES}", edges)
    for edge in edges:
        require(type(edge) in (int, float), "timestep_edges", "holds numbers", edge)
    return TimestepBins(tuple(float(edge) for edge in edges))


def _layers(layers: Any, version: int) -> dict[str, LayerEntry]:
    is_table = isinstance(layers, dict) and len(layers) <= MAX_LAYERS
    require(is_table, "layers", f"is an object of at most {MAX_LAYERS}", layers)
    parsed = {}
    for name, entry in layers.items():
        check_name(name)
        try:
            parsed[name] = LayerEntry.from_dict(_of_this_version(entry, version))
        except CheckpointError as error:
            raise CheckpointError(f"layer {name}: {error}") from error
    return parsed


def _of_this_version(entry: Any, version: int) -> Any:
    """Complete an entry with the keys that its version lacked. Raises CheckpointError if it holds
    such a key.
    """
    added = [key for key, since in _ADDED_BY_VERSION.items() if version < since]
    if version >= FORMAT_VERSION or not isinstance(entry, dict):
        return entry
    if newer := [key for key in added if key in entry]:
        raise damaged(f"unknown key {shorten(newer[0])} in format version {version}")
    return {**entry, **dict.fromkeys(added, False)}


_BY_BIN = dict.fromkeys(("centred_by_bin", "deflated_by_bin"), 4)
_ADDED_BY_VERSION = {"deflated": 2, "centred": 2, "rotated": 3, **_BY_BIN, "weights_alone": 6}
_SWITCHES = ("smoothed", *_ADDED_BY_VERSION)


def _hashes(hashes: Any) -> dict[str, str]:
    require(isinstance(hashes, dict), "weight_sha256", "is an object", hashes)
    for file, digest in hashes.items():
        is_digest = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest)
        require(bool(is_digest), f"weight_sha256[{file!r}]", "is 64 hexadecimal digits", digest)
    return hashes
