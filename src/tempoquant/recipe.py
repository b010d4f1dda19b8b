"""Recipe: every setting of a run that changes its result, once. Read and written as TOML; the resolved recipe is stored
in the checkpoint. How a machine does the work (device, memory) is no part of it."""

import dataclasses
import sys
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import ConfigDict, Discriminator, Field, Strict, Tag, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import to_jsonable_python

from tempoquant.errors import RecipeError
from tempoquant.formats.format import Format, get_format
from tempoquant.layer_rule import KEEP_16BIT, LayerRule, require
from tempoquant.validation import explain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_EXPONENT_OFFSET = 8
NEEDS = {"centring_by_bin": "centring", "deflation_by_bin": "deflation", "act_order": "gptq"}
"""Switches, each with the one that it says more about."""
MOST_BY_BIN = 1 / 32
"""Of a layer's codes: what means and biases by timestep bin may take. Four bins do from a width of 1024 on."""

Item = TypeVar("Item")
Several = Annotated[tuple[Item, ...], Strict(False)]  # TOML and JSON have lists
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
RuleName = Literal["floor", "ceil", "least_error"]
Fractions = Several[Annotated[float, Field(gt=0, lt=1)]]
BinFractions = Annotated[
    Annotated[Fractions, Tag("<list>")] | Annotated[dict[str, Fractions], Tag("<table>")],
    Discriminator(lambda value: "<table>" if isinstance(value, Mapping) else "<list>"),
]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Recipe:
    """What to do to a model.

    Attributes:
        name: what logs and model cards call the run.
        format: 4-bit format of weights and activations of every block linear, unless `layers` says otherwise.
        layers: exceptions, in order; the first that matches wins, for format and rank both.
        keep_16bit_blocks: how many blocks at the start and at the end of each denoiser stay in 16 bits.
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
        bin_fractions: timestep bins, as ascending fractions of a denoiser's steps: one list for every denoiser, or a
            mapping from denoiser name to list, in which a denoiser that is not named has one bin.
        share_smoothing: linears that read the same input share one smoothing factor, Hessian and clip ratio.
        statistics_branches: guidance branches that ranges and Hessians see, "both" or "conditional"; the clip search
            sees both.
        block_inputs: what a block is calibrated on, outputs of the "16bit" or of the "quantized" block before it.
        num_prompts: calibration prompts.
        samples_per_denoiser: transformer calls kept of each denoiser, spread over its timesteps; None for as many as
            hold about a million video tokens.
        num_steps, flow_shift, guidance_scale, height, width, num_frames: how calibration samples; None for the
            model's own.
    """

    name: str
    format: str = "mxfp4"
    layers: Several[LayerRule] = ()
    keep_16bit_blocks: Annotated[tuple[Count, Count], Strict(False)] = (0, 0)
    weight_scale_rule: RuleName = "floor"
    activation_scale_rule: RuleName = "ceil"
    smoothing_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    smoothing_statistic: Literal["amax", "rms"] = "amax"
    rank: Count = 0
    deflation: bool = False
    deflation_by_bin: bool = False
    rotation: bool = False
    prior_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    centring: bool = False
    centring_by_bin: bool = False
    gptq: bool = False
    act_order: bool = False
    damping_fraction: PositiveFloat = 0.01
    block_size: Positive = 128
    clip_ratios: Several[float] = ()
    exponent_offsets: Annotated[
        Several[Annotated[int, Field(ge=-MAX_EXPONENT_OFFSET, le=MAX_EXPONENT_OFFSET)]], Field(min_length=1)
    ] = (0,)
    clip_search_tokens_per_bin: Positive = 256
    bin_fractions: BinFractions = dataclasses.field(default=(), hash=False)  # a mapping has no hash
    share_smoothing: bool = False
    statistics_branches: Literal["both", "conditional"] = "both"
    block_inputs: Literal["16bit", "quantized"] = "16bit"
    num_prompts: Positive = 12
    samples_per_denoiser: Positive | None = None
    num_steps: Positive | None = None
    flow_shift: PositiveFloat | None = None
    guidance_scale: PositiveFloat | None = None
    height: Positive | None = None
    width: Positive | None = None
    num_frames: Positive | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, values: Any, check: Any) -> "Recipe":
        try:
            return check(values)
        except ValidationError as error:
            raise RecipeError(f"{explain(error, cls)}.") from error

    def __post_init__(self) -> None:
        get_format(self.format)
        ranks = (self.rank, *(rule.rank or 0 for rule in self.layers))
        require(max(ranks) > 0 or not self.deflation, "deflation takes the branch out of the input: it needs a rank")
        for switch, needed in NEEDS.items():
            given = not getattr(self, switch) or getattr(self, needed)
            require(given, f"{switch} does nothing without {needed}: set {needed} = true, or {switch} = false")
        is_same = self.centring == self.centring_by_bin
        require(is_same or not self.deflation_by_bin, "deflation_by_bin needs centring_by_bin where there is centring")
        require(
            all(c * 2.0**k <= 2 and c > 0 for c in self.clip_ratios for k in self.exponent_offsets),
            f"clip ratio · 2^offset lies in (0, 2]; {self.clip_ratios} · 2^{self.exponent_offsets} does not",
        )
        bins = self.bin_fractions
        for fractions in bins.values() if isinstance(bins, Mapping) else [bins]:
            ascending = list(fractions) == sorted(set(fractions))
            require(ascending, f"bin_fractions ascend strictly inside (0, 1), not {list(fractions)}")

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

    def bin_fractions_of(self, denoiser: str) -> tuple[float, ...]:
        """The timestep bins of one denoiser, as fractions of its steps; () is one bin for all of them.

        A mapping that does not name it gives it one bin. A misspelt name is not taken for that: `check_denoisers`
        refuses it.
        """
        if isinstance(self.bin_fractions, Mapping):
            return self.bin_fractions.get(denoiser, ())
        return self.bin_fractions

    def check_denoisers(self, denoisers: Collection[str], model: str) -> None:
        """Raise RecipeError when bin fractions are given to what no denoiser of a model is called."""
        names = list(denoisers)
        unknown = sorted(set(self.bin_fractions) - set(names)) if isinstance(self.bin_fractions, Mapping) else []
        require(
            not unknown,
            f"bin_fractions has {', '.join(map(repr, unknown))}, but the denoisers of {model} are {', '.join(names)}: "
            "name these, or give one list for all",
        )

    def clip_candidates(self) -> tuple[float, ...]:
        """The search's clip ratios with the exponent offset folded in, c·2^k, in the order that breaks ties."""
        return tuple(c * 2.0**k for c in self.clip_ratios for k in self.exponent_offsets)

    def format_of(self, layer_name: str, denoiser: str, block_index: int, num_blocks: int) -> Format | None:
        """The format of one layer; None keeps it in 16 bits."""
        first, last = self.keep_16bit_blocks
        if block_index < first or block_index >= num_blocks - last:
            return None
        rule = self.rule_of(layer_name, denoiser)
        chosen = self.format if rule is None or rule.format is None else rule.format
        return None if chosen == KEEP_16BIT else get_format(chosen)

    def rank_of(self, layer_name: str, denoiser: str) -> int:
        """The rank of one layer's low-rank branch, should it get four bits; 0 for none."""
        rule = self.rule_of(layer_name, denoiser)
        return self.rank if rule is None or rule.rank is None else rule.rank

    def rule_of(self, layer_name: str, denoiser: str) -> LayerRule | None:
        """The exception that holds for a layer, or None."""
        return next((rule for rule in self.layers if rule.matches(layer_name, denoiser)), None)

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
        return to_jsonable_python(self, exclude_none=True)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "the recipe") -> "Recipe":
        """Build a recipe from plain values. Integers may stand for floats, nothing else converts.

        Raises RecipeError for unknown keys, wrong types and wrong values.
        """
        try:
            return cls(**_in_new_words(settings))
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

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


def _in_new_words(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings with today's names in place of those that older recipes and checkpoints have.

    `samples_per_expert` is `samples_per_denoiser`. A key for each of Wan2.2's experts became `bin_fractions`; one of
    these keys alone leaves the other expert one bin, as it did.
    """
    settings = _renamed(settings, "samples_per_expert", "samples_per_denoiser")
    old = {name: key for name in ("high_noise", "low_noise") if (key := f"bin_fractions_{name}") in settings}
    if not old:
        return settings
    require("bin_fractions" not in settings, f"bin_fractions replaces {' and '.join(old.values())}: give it alone")
    high, low = (settings[old[name]] if name in old else [] for name in ("high_noise", "low_noise"))
    same = isinstance(high, list | tuple) and isinstance(low, list | tuple) and list(high) == list(low)
    others = {key: value for key, value in settings.items() if key not in old.values()}
    return {**others, "bin_fractions": high if same else {"high_noise": high, "low_noise": low}}


def _renamed(settings: Mapping[str, Any], old: str, new: str) -> Mapping[str, Any]:
    if old not in settings:
        return settings
    require(new not in settings, f"{new} replaces {old}: give it alone")
    return {new if key == old else key: value for key, value in settings.items()}
