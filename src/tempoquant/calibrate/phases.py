"""Phase: what a block is run on every sample for."""

from enum import Enum

from tempoquant.recipe import Recipe


class Phase(Enum):
    """What the inputs are watched for."""

    RANGE = "range"
    REGRESSION = "regression"
    HESSIAN = "hessian"


def phases_of(recipe: Recipe) -> list[Phase]:
    """The phases a recipe needs, in order."""
    wanted = {
        Phase.RANGE: recipe.watches_range, Phase.REGRESSION: recipe.deflation_by_bin, Phase.HESSIAN: recipe.gptq
    }  # fmt: skip
    return [phase for phase, needed in wanted.items() if needed]
