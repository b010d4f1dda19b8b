"""LayerRule: what a recipe says of some layers only."""

import fnmatch
from dataclasses import dataclass

from tempoquant.errors import RecipeError
from tempoquant.formats.format import get_format
from tempoquant.timesteps import Expert

KEEP_16BIT = "16bit"


def require(condition: bool, sentence: str) -> None:
    """Raise RecipeError with a sentence, given without its full stop, unless the condition holds."""
    if not condition:
        raise RecipeError(sentence + ".")


@dataclass(frozen=True)
class LayerRule:
    """Gives the layers whose name matches `pattern` (shell wildcards) a format or a rank of their own, or keeps them in
    16 bits; what it leaves out is the recipe's.

    A pattern is tried against `blocks.0.attn1.to_q` and against `high_noise.blocks.0.attn1.to_q`.
    """

    pattern: str
    format: str | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        where, rank = f"a layer rule for {self.pattern!r}", self.rank
        require(isinstance(self.pattern, str), f"a layer rule's pattern is a text, not {self.pattern!r}")
        require(self.format is not None or rank is not None, f"{where} says nothing: give it a format or a rank")
        require(rank is None or (type(rank) is int and rank >= 0), f"{where}: rank is a count, not {rank!r}")
        require(rank is None or self.format != KEEP_16BIT, f"{where}: a layer in {KEEP_16BIT} has no rank")
        if self.format not in (None, KEEP_16BIT):
            get_format(str(self.format))

    def matches(self, layer_name: str, expert: Expert) -> bool:
        names = (layer_name, f"{expert.value}.{layer_name}")
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in names)
