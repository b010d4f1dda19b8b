"""Recipe: every setting of a run that changes its result, each in one place.

A recipe is read and written as TOML, and the checkpoint stores the resolved one. Settings of the
machine (device, memory) are not part of it.
"""

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

from tempoquant.earlier_recipes import in_current_words
from tempoquant.errors import RecipeError
from tempoquant.formats.format import Format, get_format
from tempoquant.layer_rule import KEEP_16BIT, KEPT_TEXT_ENCODER, LayerRule, TextEncoderFormat, require
from tempoquant.validation import explain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_EXPONENT_OFFSET = 8
NEEDS = {"centring_by_bin": "centring", "deflation_by_bin": "deflation", "act_order": "gptq"}
"""Switches, each with the switch that it refines and needs."""
MOST_BY_BIN = 1 / 32
"""The largest share of a layer's codes that means and biases by timestep bin may take."""

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
    """The settings that decide what happens to a model.

    Attributes:
        name: the run's name in logs and model cards.
        format: 4-bit format of weights and activations of every block linear, unless `layers` says
            otherwise.
        layers: exceptions, in order; the first that matches wins, for format and rank both.
        keep_16bit_blocks: how many first and last blocks of each denoiser stay in 16 bits.
        modulation_format: 4-bit format of the weights of modulation: linears that read a timestep
            and no tokens, and whose inputs stay in 16 bits. None keeps the weights in 16 bits too.
        weight_scale_rule, activation_scale_rule: how scales follow from a group: "floor" or "ceil",
            which differ for E8M0 scales only, or "least_error", the best of a few (weights: under
            the Hessian's diagonal).
        smoothing_alpha: share of the input's range moved into the weight, in [0, 1]; None for none.
        smoothing_statistic: a feature's range: its largest magnitude, "amax", or its root mean
            square, "rms".
        rank: of the 16-bit low-rank branch, unless `layers` says otherwise; 0 for none.
        deflation: choose the branch for weight and input, and subtract its part of the input.
        deflation_by_bin: fit the deflation's regression separately in each timestep bin.
        rotation: mix smoothed features in blocks of sixteen (Hadamard), against outliers.
        prior_fraction: share of white noise at the input's typical energy in each feature's mean
            square, in [0, 1), and a quarter of it in covariance and Hessian; it bounds features
            that calibration hardly saw.
        centring: subtract the input's mean before quantizing; the bias adds its product back.
        centring_by_bin: use one mean, and one bias, for each timestep bin, in layers wide enough
            (see `suited_to`).
        gptq: round by GPTQ against the Hessian of the quantized, smoothed input, not to nearest.
        act_order: let GPTQ round features by falling mean square of their input.
        damping_fraction: added to the Hessian's diagonal, as a fraction of its mean.
        block_size: GPTQ's columns between lazy updates; speed, never the result.
        clip_ratios, exponent_offsets: candidates c·2^k of the clip search; no ratios, no search.
        clip_search_tokens_per_bin: evenly spaced tokens that the search reads in each timestep bin.
        bin_fractions: timestep bins, as ascending fractions of a denoiser's steps: one list for
            every denoiser, or a mapping from denoiser name to list; a denoiser that the mapping
            does not name has one bin.
        share_smoothing: linears that read one input share smoothing factor, Hessian and clip ratio.
        statistics_branches: guidance branches that ranges and Hessians see, "both" or
            "conditional"; the clip search sees both.
        block_inputs: calibrate a block on outputs of the "16bit" or "quantized" block before it.
        text_encoder: format of text encoders' linears: "int8", "nf4", or "16bit" for no change.
        num_prompts: calibration prompts.
        samples_per_denoiser: transformer calls kept of each denoiser, spread over its timesteps;
            None for as many as hold about a million video tokens.
        num_steps, flow_shift, guidance_scale, height, width, num_frames: sampling settings of
            calibration; None for the model's own.
    """

    name: str
    format: str = "mxfp4"
    layers: Several[LayerRule] = ()
    keep_16bit_blocks: Annotated[tuple[Count, Count], Strict(False)] = (0, 0)
    modulation_format: str | None = None
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
    text_encoder: TextEncoderFormat = KEPT_TEXT_ENCODER
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
        for name in (self.format, self.modulation_format or self.format):
            get_format(name)
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
        """Return the format of every layer that `layers` does not name."""
        return get_format(self.format)

    @property
    def needs_calibration(self) -> bool:
        """Return whether anything in this recipe looks at activations."""
        return self.watches_range or self.gptq

    @property
    def watches_range(self) -> bool:
        """Return whether anything needs the inputs' range, mean or covariance, or tokens of
        them.
        """
        has_prior = self.gptq and self.prior_fraction > 0  # the prior's energy is that of the inputs
        return (
            self.smoothing_alpha is not None or self.deflation or self.centring or has_prior or bool(self.clip_ratios)
        )

    def bin_fractions_of(self, denoiser: str) -> tuple[float, ...]:
        """Return the timestep bins of one denoiser, as fractions of its steps; () is one bin for
        all steps.

        A denoiser that the mapping does not name has one bin; `check_denoisers` refuses misspelt
        names.
        """
        if isinstance(self.bin_fractions, Mapping):
            return self.bin_fractions.get(denoiser, ())
        return self.bin_fractions

    def check_denoisers(self, denoisers: Collection[str], model: str) -> None:
        """Raise RecipeError if bin fractions name a denoiser that the model does not have."""
        names = list(denoisers)
        unknown = sorted(set(self.bin_fractions) - set(names)) if isinstance(self.bin_fractions, Mapping) else []
        require(
            not unknown,
            f"bin_fractions has {', '.join(map(repr, unknown))}, but the denoisers of {model} are {', '.join(names)}: "
            "name these, or give one list for all",
        )

    def clip_candidates(self) -> tuple[float, ...]:
        """Return c·2^k of every clip ratio and exponent offset, in the order that breaks ties."""
        return tuple(c * 2.0**k for c in self.clip_ratios for k in self.exponent_offsets)

    def format_of(
        self, layer_name: str, denoiser: str, block_index: int, num_blocks: int, is_modulation: bool = False
    ) -> Format | None:
        """Return one layer's format, None for 16 bits; a rule can only keep modulation."""
        first, last = self.keep_16bit_blocks
        if block_index < first or block_index >= num_blocks - last:
            return None
        rule = self.rule_of(layer_name, denoiser)
        chosen = self.format if rule is None or rule.format is None else rule.format
        named = self.modulation_format if is_modulation else chosen
        return None if chosen == KEEP_16BIT or named is None else get_format(named)

    def rank_of(self, layer_name: str, denoiser: str) -> int:
        """Return the rank of one layer's low-rank branch, if it gets four bits; 0 for none."""
        rule = self.rule_of(layer_name, denoiser)
        return self.rank if rule is None or rule.rank is None else rule.rank

    def rule_of(self, layer_name: str, denoiser: str) -> LayerRule | None:
        """Return the exception that holds for a layer, or None."""
        return next((rule for rule in self.layers if rule.matches(layer_name, denoiser)), None)

    def suited_to(self, in_features: int, out_features: int, num_bins: int) -> "Recipe":
        """Return the recipe for a linear of this size: without means by bin if they would take too
        many bytes.

        A mean and a bias for each bin take 2 · (in + out) bytes, beside in · out / 2 for the codes.
        In narrow layers a higher rank gains more for the same bytes. A deflation by bin is kept at
        any size, since the user asked for it, and it needs means by bin.
        """
        share = 4 * num_bins * (1 / in_features + 1 / out_features)
        if not self.centring_by_bin or self.deflation_by_bin or share <= MOST_BY_BIN:
            return self
        return self.replace(centring_by_bin=False)

    def replace(self, **changes: Any) -> "Recipe":
        """Return a copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting as plain values (lists for tuples, no None), ready for TOML and
        JSON.
        """
        return to_jsonable_python(self, exclude_none=True)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "the recipe") -> "Recipe":
        """Build a recipe from plain values. Integers may stand for floats, nothing else converts.

        Raises RecipeError for unknown keys, wrong types and wrong values.
        """
        try:
            return cls(**in_current_words(settings))
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

    @classmethod
    def load(cls, name_or_path: "str | Path | Recipe") -> "Recipe":
        """Load a built-in recipe by name, or a recipe from a TOML file. Raises RecipeError if there
        is neither.
        """
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
    """Return names of the recipes inside the package."""
    folder = resources.files("tempoquant") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))
