"""Phase: the purpose for which a block runs on every sample."""

from enum import Enum

from tempoquant.recipe import Recipe


class Phase(Enum):
    """The purposes for which inputs are watched."""

    RANGE = "range"
    REGRESSION = "regression"
    HESSIAN = "hessian"


def phases_of(recipe: Recipe) -> list[Phase]:
    """Return the phases a recipe needs, in order."""
    wanted = {Phase.RANGE: recipe.watches_range, Phase.REGRESSION: recipe.deflation_by_bin, Phase.HESSIAN: recipe.gptq}
    return [phase for phase, needed in wanted.items() if needed]
