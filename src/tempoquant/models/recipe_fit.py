"""A check, from headers and before any work, that a model can follow a recipe."""

from tempoquant.errors import RecipeError
from tempoquant.formats import Format
from tempoquant.models.source import SourceModel
from tempoquant.recipe import KEEP_16BIT, Recipe


def check_recipe_fits(source: SourceModel, recipe: Recipe) -> None:
    """Refuse settings that would fail after hours of work.

    Raises:
        RecipeError: bin fractions for a denoiser that is none of the model's, a group size that
            does not divide, a rank too large, a layer pattern that matches nothing, or a recipe
            that leaves every layer in 16 bits.
        ModelError: the denoisers' weights are missing or damaged, or already quantized.
    """
    recipe.check_denoisers(source.denoiser_names, source.name)
    unused = set(recipe.layers)
    num_quantized = 0
    for denoiser in source.denoiser_names:
        source.component_of(denoiser).require_16_bit()
        num_blocks = len(source.blocks(denoiser))
        modulation = source.modulation(denoiser)
        for name, linear in {**source.linears(denoiser), **modulation}.items():
            unused -= {rule for rule in recipe.layers if rule.matches(name, denoiser)}
            format = recipe.format_of(name, denoiser, linear.block_index, num_blocks, name in modulation)
            if format is None:
                continue
            num_quantized += 1
            rank = 0 if name in modulation else recipe.rank_of(name, denoiser)
            check_linear_fits(format, rank, f"{name} of {denoiser}", linear.out_features, linear.in_features)
    if unused:
        raise RecipeError(f"the layer pattern {next(iter(unused)).pattern!r} matches no layer of {source.name}.")
    if not num_quantized:
        raise RecipeError(f"this recipe keeps every layer in {KEEP_16BIT}: there is nothing to quantize.")


def check_linear_fits(format: Format, rank: int, name: str, out_features: int, in_features: int) -> None:
    """Raise RecipeError for a linear that a format's groups do not divide, or whose rank is too
    large.
    """
    format.num_groups(in_features, name)
    if rank > min(out_features, in_features):
        raise RecipeError(f"rank {rank} exceeds the smaller side of {name}, {out_features} × {in_features}.")
