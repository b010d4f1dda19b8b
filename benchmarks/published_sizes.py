"""Count what published denoisers hold in 16 bits, in four, and with modulation in four as well.

    python -m benchmarks.published_sizes                  # every model that `tempoquant plan` knows
    python -m benchmarks.published_sizes flux.1-dev

Only configs are read. The recipe is `default`.
"""

import sys

from tempoquant.checkpoint.tensors import num_replacing_bytes
from tempoquant.models.pipeline_configs import published_models
from tempoquant.planning.generation_memory import (
    QuantizedLayers,
    denoiser_bytes,
    empty_denoiser,
    foreseen_layers,
)
from tempoquant.recipe import Recipe

GIB, MIB = 2**30, 2**20
RECIPE = Recipe.load("default")
WITH_MODULATION = RECIPE.replace(modulation_format=RECIPE.format)


def bits_of(layers: QuantizedLayers) -> float:
    """Return the bits that replace one weight of these layers, on average."""
    weights = sum(entry.in_features * entry.out_features for entry in layers.entries.values())
    return 8 * sum(num_replacing_bytes(entry, layers.num_bins) for entry in layers.entries.values()) / weights


def describe(name: str) -> str:
    """Return a line for the first denoiser of a published model."""
    configs = published_models()[name]
    denoiser = configs.denoisers[0].name
    model = empty_denoiser(configs, denoiser)
    total = sum(parameter.numel() for parameter in model.parameters())
    modulation = sum(
        module.weight.numel() for each, module in model.named_modules() if configs.family.is_modulation(each)
    )
    quantized, smaller = (foreseen_layers(configs, denoiser, recipe) for recipe in (RECIPE, WITH_MODULATION))
    sizes = [denoiser_bytes(configs, denoiser, layers) for layers in (None, quantized, smaller)]
    gib = " → ".join(f"{size.total / GIB:.1f}" for size in sizes)
    mib = " → ".join(f"{max(size.blocks) / MIB:.0f}" for size in sizes)
    return (
        f"{name}: {total / 1e9:.2f} billion weights, {len(quantized.entries)} linears, {bits_of(quantized):.2f} bits; "
        f"modulation {modulation / total:.1%} of the weights, {2 * modulation / sizes[1].total:.0%} of the bytes; "
        f"GiB {gib}; largest block, MiB {mib}"
    )


if __name__ == "__main__":
    for each in sys.argv[1:] or published_models():
        print(describe(each), flush=True)
