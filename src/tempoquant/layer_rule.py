"""LayerRule: a recipe's settings for some layers only."""

import fnmatch
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from tempoquant.errors import RecipeError
from tempoquant.formats.format import get_format
from tempoquant.validation import explain, shorten

KEEP_16BIT = "16bit"
TextEncoderFormat = Literal["16bit", "int8", "nf4"]
KEPT_TEXT_ENCODER: TextEncoderFormat = "16bit"


def require(condition: bool, sentence: str) -> None:
    """Raise RecipeError with a sentence, given without its full stop, unless the condition
    holds.
    """
    if not condition:
        raise RecipeError(sentence + ".")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LayerRule:
    """Exceptions of a recipe for the layers whose name matches `pattern` (shell wildcards).

    A rule gives these layers their own format or rank, or keeps them in 16 bits; the recipe decides
    everything else. A pattern is tried against `blocks.0.attn1.to_q` and against
    `high_noise.blocks.0.attn1.to_q`.
    """

    pattern: StrictStr
    format: StrictStr | None = None
    rank: Annotated[StrictInt, Field(ge=0)] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, values: Any, check: Any) -> "LayerRule":
        is_rule = isinstance(values, Mapping | ArgsKwargs | LayerRule)
        require(is_rule, f"layers holds tables with a pattern, and a format or a rank or both, not {shorten(values)}")
        try:
            return check(values)
        except ValidationError as error:
            which = "" if isinstance(values, ArgsKwargs) else f" {shorten(values)}"
            raise RecipeError(f"layer rule{which}: {explain(error, cls)}.") from error

    def __post_init__(self) -> None:
        where, rank = f"a layer rule for {self.pattern!r}", self.rank
        require(self.format is not None or rank is not None, f"{where} is empty: give it a format or a rank")
        require(rank is None or self.format != KEEP_16BIT, f"{where}: a layer in {KEEP_16BIT} has no rank")
        if self.format not in (None, KEEP_16BIT):
            get_format(str(self.format))

    def matches(self, layer_name: str, denoiser: str) -> bool:
        names = (layer_name, f"{denoiser}.{layer_name}")
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in names)
