"""Recipe: every setting of a run that changes its result, once. Read and written as TOML; the resolved recipe is stored
in the checkpoint. How a machine does the work (device, memory) is no part of it."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from tempoquant.errors import RecipeError
from tempoquant.formats.format import Format, ScaleRule, get_format
from tempoquant.layer_rule import KEEP_16BIT, LayerRule, require
from tempoquant.timesteps import Expert

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_EXPONENT_OFFSET = 8
NEEDS = {"centring_by_bin": "centring", "deflation_by_bin": "deflation", "act_order": "gptq"}
"""Switches, each with the one that it says more about."""
MOST_BY_BIN = 1 / 32
"""Of a layer's codes: what means and biases by timestep bin may take. Four bins do from a width of 1024 on."""


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
        name: what logs and model cards call the run.
        format: 4-bit format of weights and activations of every block linear, unless `layers` says otherwise.
        layers: exceptions, in order; the first that matches wins, for format and rank both.
        keep_16bit_blocks: how many blocks at the start and at the end of each expert stay in 16 bits.
        weight_scale_rule, activation_scale_rule: how scales follow from a group: "floor" or "ceil", which differ for
            E8M0 scales only, or "least_error", the best of a few (weights: under the Hessian's diagonal).
        smoothing_alpha: share of the input's range moved into the weight, in [0, 1]; None for no smoothing.
        smoothing_statistic: what a feature's range is: its largest magnitude, "amax", or its root mean square, "rms".
        rank: of the 16-bit low-rank branch, unless `layers` says otherwise; 0 for none.
        deflation: choose the branch for weight and input together, and take it out of the input before rounding.
        deflation_by_bin: take it out by a regression of each timestep bin's own.
        rotation: mix smoothed features in blocks of sixteen (Hadamard), so that none stands out of its group.
        prior_fraction: share of white noise at the input's typical energy in each feature's mean square, in [0, 1), and
            a quarter of it in covariance and Hessian: what calibration hardly saw counts for something.
        centring: take the input's mean off before it is quantized; the bias gives it back.
        centring_by_bin: with one mean, and one bias, for each timestep bin, in layers wide enough (see `suited_to`).
        gptq: round by GPTQ against the Hessian of the quantized, smoothed input, instead of to nearest.
        act_order: GPTQ rounds features by falling mean square of their input, instead of as they stand.
        damping_fraction: added to the Hessian's diagonal, as a fraction of its mean.
        block_size: GPTQ's columns between lazy updates; speed, never the result.
        clip_ratios, exponent_offsets: candidates c·2^k of the clip search; no ratios, no search.
        clip_search_tokens_per_bin: evenly spaced tokens that the search reads in each timestep bin.
        bin_fractions_high_noise, bin_fractions_low_noise: timestep bins, as fractions of the expert's steps.
        share_smoothing: linears that read the same input share one smoothing factor, Hessian and clip ratio.
        statistics_branches: guidance branches that ranges and Hessians see, "both" or "conditional"; the clip search
            sees both.
        block_inputs: what a block is calibrated on, outputs of the "16bit" or of the "quantized" block before it.
        num_prompts: calibration prompts.
        samples_per_expert: transformer calls kept of each expert, spread over its timesteps; None for as many as hold
            about a million video tokens.
        num_steps, flow_shift, guidance_scale, height, width, num_frames: how calibration samples; None for the
            model's own.
    """

    name: str
    format: str = "mxfp4"
    layers: tuple[LayerRule, ...] = ()
    keep_16bit_blocks: tuple[int, int] = (0, 0)
    weight_scale_rule: str = ScaleRule.FLOOR.value
    activation_scale_rule: str = ScaleRule.CEIL.value
    smoothing_alpha: float | None = None
    smoothing_statistic: str = "amax"
    rank: int = 0
    deflation: bool = False
    deflation_by_bin: bool = False
    rotation: bool = False
    prior_fraction: float = 0.0
    centring: bool = False
    centring_by_bin: bool = False
    gptq: bool = False
    act_order: bool = False
    damping_fraction: float = 0.01
    block_size: int = 128
    clip_ratios: tuple[float, ...] = ()
    exponent_offsets: tuple[int, ...] = (0,)
    clip_search_tokens_per_bin: int = 256
    bin_fractions_high_noise: tuple[float, ...] = ()
    bin_fractions_low_noise: tuple[float, ...] = ()
    share_smoothing: bool = False
    statistics_branches: str = "both"
    block_inputs: str = "16bit"
    num_prompts: int = 12
    samples_per_expert: int | None = None
    num_steps: int | None = None
    flow_shift: float | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None

    def __post_init__(self) -> None:
        get_format(self.format)
        for rule in (self.weight_scale_rule, self.activation_scale_rule):
            rules = [known.value for known in ScaleRule]
            require(rule in rules, f"a scale rule is one of {rules}, not {rule!r}")
        require(
            self.smoothing_alpha is None or 0 <= self.smoothing_alpha <= 1,
            f"smoothing_alpha lies in [0, 1], not {self.smoothing_alpha}",
        )
        require(0 <= self.prior_fraction < 1, f"prior_fraction lies in [0, 1), not {self.prior_fraction}")
        require(self.rank >= 0, f"rank is 0 or more, not {self.rank}")
        ranks = (self.rank, *(rule.rank or 0 for rule in self.layers))
        require(max(ranks) > 0 or not self.deflation, "deflation takes the branch out of the input: it needs a rank")
        for switch, needed in NEEDS.items():
            given = not getattr(self, switch) or getattr(self, needed)
            require(given, f"{switch} does nothing without {needed}: set {needed} = true, or {switch} = false")
        is_same = self.centring == self.centring_by_bin
        require(is_same or not self.deflation_by_bin, "deflation_by_bin needs centring_by_bin where there is centring")
        require(
            0 < self.damping_fraction < math.inf, f"damping_fraction is above 0 and finite, not {self.damping_fraction}"
        )
        require(
            bool(self.exponent_offsets) and all(abs(k) <= MAX_EXPONENT_OFFSET for k in self.exponent_offsets),
            f"exponent_offsets are one or more of ±{MAX_EXPONENT_OFFSET}, not {self.exponent_offsets}",
        )
        require(
            all(c * 2.0**k <= 2 and c > 0 for c in self.clip_ratios for k in self.exponent_offsets),
            f"clip ratio · 2^offset lies in (0, 2]; {self.clip_ratios} · 2^{self.exponent_offsets} does not",
        )
        require(
            len(self.keep_16bit_blocks) == 2 and min(self.keep_16bit_blocks) >= 0,
            f"keep_16bit_blocks is two counts, first and last, not {self.keep_16bit_blocks}",
        )
        for fractions in (self.bin_fractions_high_noise, self.bin_fractions_low_noise):
            ascending = list(fractions) == sorted(set(fractions)) and all(0 < f < 1 for f in fractions)
            require(ascending, f"bin fractions ascend strictly inside (0, 1), not {fractions}")
        for key, known in (("statistics_branches", ("both", "conditional")), ("block_inputs", ("16bit", "quantized")),
                           ("smoothing_statistic", ("amax", "rms"))):  # fmt: skip
            require(getattr(self, key) in known, f"{key} is one of {known}, not {getattr(self, key)!r}")
        counts = ("block_size", "clip_search_tokens_per_bin", "num_prompts", "samples_per_expert",
                  "num_steps", "height", "width", "num_frames", "flow_shift", "guidance_scale")  # fmt: skip
        for key in counts:
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, f"{key} is above 0 and finite, not {value}")

    @property
    def default_format(self) -> Format:
        """The format of every layer that `layers` does not name."""
        return get_format(self.format)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything in this recipe looks at activations."""
        return self.watches_range or self.gptq

    @property
    def watches_range(self) -> bool:
        """Whether anything needs the inputs' range, mean or covariance, or tokens of them."""
        has_prior = self.gptq and self.prior_fraction > 0  # whose energy is that of the inputs
        return (
            self.smoothing_alpha is not None or self.deflation or self.centring or has_prior or bool(self.clip_ratios)
        )

    def bin_fractions(self, expert: Expert) -> tuple[float, ...]:
        return self.bin_fractions_high_noise if expert is Expert.HIGH_NOISE else self.bin_fractions_low_noise

    def clip_candidates(self) -> tuple[float, ...]:
        """The search's clip ratios with the exponent offset folded in, c·2^k, in the order that breaks ties."""
        return tuple(c * 2.0**k for c in self.clip_ratios for k in self.exponent_offsets)

    def format_of(self, layer_name: str, expert: Expert, block_index: int, num_blocks: int) -> Format | None:
        """The format of one layer; None keeps it in 16 bits."""
        first, last = self.keep_16bit_blocks
        if block_index < first or block_index >= num_blocks - last:
            return None
        rule = self.rule_of(layer_name, expert)
        chosen = self.format if rule is None or rule.format is None else rule.format
        return None if chosen == KEEP_16BIT else get_format(chosen)

    def rank_of(self, layer_name: str, expert: Expert) -> int:
        """The rank of one layer's low-rank branch, should it get four bits; 0 for none."""
        rule = self.rule_of(layer_name, expert)
        return self.rank if rule is None or rule.rank is None else rule.rank

    def rule_of(self, layer_name: str, expert: Expert) -> LayerRule | None:
        """The exception that holds for a layer, or None."""
        return next((rule for rule in self.layers if rule.matches(layer_name, expert)), None)

    def suited_to(self, in_features: int, out_features: int, num_bins: int) -> "Recipe":
        """The recipe for a linear of this size: without means by bin where they are too large a part of it.

        A mean and a bias for each bin are 2 · (in + out) bytes of the in · out / 2 that codes take. In narrow layers a
        higher rank gains more for the same bytes. A deflation by bin was asked for whatever it takes, and needs them.
        """
        share = 4 * num_bins * (1 / in_features + 1 / out_features)
        if not self.centring_by_bin or self.deflation_by_bin or share <= MOST_BY_BIN:
            return self
        return self.replace(centring_by_bin=False)

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values (lists for tuples, no None), ready for TOML and JSON."""
        return _without_none({key: _plain(value) for key, value in dataclasses.asdict(self).items()})

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "the recipe") -> "Recipe":
        """Build a recipe from plain values. Raises RecipeError for unknown keys, wrong types and wrong values."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise RecipeError(
                f"{where} has unknown setting {', '.join(map(repr, unknown))}; known: {', '.join(known)}."
            )
        if "name" not in settings:
            raise RecipeError(f'{where} has no name: add name = "…".')
        try:
            return cls(**{key: _typed(key, value, known[key].type) for key, value in settings.items()})
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"{where} has a value of the wrong type: {error}.") from error

    @classmethod
    def load(cls, name_or_path: "str | Path | Recipe") -> "Recipe":
        """A built-in recipe by name, or one from a TOML file. Raises RecipeError when there is neither."""
        if isinstance(name_or_path, Recipe):
            return name_or_path
        builtin = resources.files("tempoquant") / "recipes" / f"{name_or_path}.toml"
        path = Path(name_or_path)
        if path.suffix == ".toml":
            if not path.is_file():
                raise RecipeError(f"there is no recipe file {path}.")
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"recipe file {path} cannot be read as UTF-8 text: {error}.") from error
        elif str(name_or_path) in builtin_recipes():
            text = builtin.read_text(encoding="utf-8")
        else:
            raise RecipeError(
                f"{str(name_or_path)!r} is neither a built-in recipe ({', '.join(builtin_recipes())}) nor a .toml file."
            )
        try:
            return cls.from_dict(tomllib.loads(text), f"recipe {name_or_path}")
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"recipe {name_or_path} is not valid TOML: {error}.") from error


def builtin_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("tempoquant") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def _plain(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return [_without_none(item) if isinstance(item, dict) else item for item in value]


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def _typed(key: str, value: Any, annotation: Any) -> Any:
    """One setting as the dataclass wants it, or RecipeError. Integers may stand for floats, nothing else converts."""
    if key == "layers":
        if not isinstance(value, list | tuple) or not all(isinstance(rule, Mapping) for rule in value):
            raise RecipeError("layers is a list of tables with a pattern, and a format or a rank or both.")
        return tuple(LayerRule(**rule) for rule in value)
    if str(annotation).startswith("tuple"):
        number = int if "int" in str(annotation) else float
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{key} is a list of numbers, not {value!r}.")
        return tuple(_number(key, item, number) for item in value)
    wanted = str(annotation).removesuffix(" | None").removeprefix("<class '").removesuffix("'>")
    if wanted in ("int", "float"):
        return _number(key, value, int if wanted == "int" else float)
    if type(value).__name__ != wanted:
        raise RecipeError(f"{key} is a {wanted}, not {value!r}.")
    return value


def _number(key: str, value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise RecipeError(f"{key} takes {'whole numbers' if kind is int else 'numbers'}, not {value!r}.")
    return kind(value)
