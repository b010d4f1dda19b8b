"""Streaming does not move the default recipe either: a plain implementation of it, in float64 and
with hooks on the whole model in memory, makes nearly the same layers.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from scipy.linalg import hadamard

from tempoquant.calibrate.hidden_states import HiddenStates
from tempoquant.calibrate.sequential import quantize_denoiser
from tempoquant.calibrate.store import SampleStore
from tempoquant.formats import ScaleRule, decode, quantize_activation, unpack, weight_scale
from tempoquant.models.replay import ReplayedDenoiser
from tempoquant.models.source import SourceModel
from tempoquant.models.wan.family import COMPONENTS, WAN
from tempoquant.models.weights import DenoiserWeights
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins
from tempoquant.tiny.outliers_pipeline import outliers_folder
from tests.methods.test_gptq import textbook_gptq
from tests.test_streaming import Inputs, inputs_of, store

__all__ = ["store"]  # the fixture

RECIPE = Recipe.load("tiny")
FORMAT, RULE = RECIPE.default_format, ScaleRule.LEAST_ERROR
# Beyond what is said in test_streaming.py: a smoothing factor or a direction that rounds to its
# other neighbour in bfloat16 moves every number of its column a little, and some of them over the
# middle of two levels.
CODES_OF_ALL_LAYERS, CODES_OF_EACH_LAYER = 0.98, 0.9
# The texts have so few tokens that differ that one code more or less is felt.
TOLERANCE_DB, TOLERANCE_OF_TEXTS_DB = 0.25, 1.5


class Plain(NamedTuple):
    """codes: (out, in) int8. weight: (out, in) float64 that the layer stands for. bias: what it
    adds besides.
    """

    codes: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def stored(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).double()


def prior(x: torch.Tensor) -> torch.Tensor:
    """Return the energy of each feature in the prior, (in,)."""
    variance, energy = x.var(0, correction=0), x.square().mean(0)
    typical = ((len(x) * variance + 8 * energy) / (len(x) + 8)).sqrt().mean() ** 2
    return typical + typical / (typical + 64 * variance) * torch.minimum(energy - variance, 16 * typical)


def share(fraction: float, x: torch.Tensor) -> float:
    return 1 - (1 - fraction) * len(x) / (len(x) + 8)


def smoothing(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    centred, rows, fraction = x - x.mean(0), torch.cat(weights), RECIPE.prior_fraction
    of_prior = share(fraction, x)
    energy = (1 - of_prior) * centred.square().mean(0) + of_prior * prior(x)
    columns = rows.square().mean(0).sqrt()
    columns = ((1 - fraction) * columns.square() + fraction * columns.mean() ** 2).sqrt()
    factor = (energy.sqrt() / columns).sqrt()
    largest = (centred.abs().amax(0) / factor).max() / FORMAT.top_level
    typical = (centred / factor).square().mean().sqrt() * 2 / FORMAT.top_level
    middle = (largest.log2() + typical.log2()) / 2 - math.log2(448 * 2.0**-6) / 2
    return stored(factor * 2.0 ** torch.maximum((middle + 0.5).floor(), torch.log2(largest / 224).ceil()))


def plainly(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> dict[str, Plain]:
    """Quantize plainly by the default recipe linears that read one input (tokens, in), float64, as
    docs/method.md writes it.
    """
    factor = smoothing(x, list(weights.values()))
    smoothed = {name: weight * factor for name, weight in weights.items()}
    centred = (x - x.mean(0)) / factor
    of_prior = share(RECIPE.prior_fraction / 4, x)
    covariance = (1 - of_prior) * centred.T @ centred / len(x) + of_prior * torch.diag(prior(x) / factor.square())
    grams = sum(weight.T @ weight for weight in smoothed.values())
    _, vectors = torch.linalg.eigh(covariance / covariance.trace() + grams / grams.trace())
    down = stored(vectors[:, -RECIPE.rank :].T / factor)
    reads = down * factor
    rotation = torch.block_diag(*[torch.tensor(hadamard(16) / 4.0)] * (x.shape[1] // 16))
    deflation = stored(rotation @ torch.linalg.solve(reads @ covariance @ reads.T, reads @ covariance).T)
    left = x / factor @ rotation - x @ down.T @ deflation.T
    offset = stored(left.mean(0))
    seen = quantize_activation(left - offset, FORMAT, RULE)
    noise = rotation @ torch.diag(prior(x) / factor.square()) @ rotation
    hessian = (1 - of_prior) * seen.T @ seen / len(seen) + of_prior * noise
    order = hessian.diagonal().argsort(descending=True)
    made = {}
    for name, weight in smoothed.items():
        taken = torch.linalg.solve(reads @ reads.T, reads @ weight.T).T
        residual = (weight - taken @ reads) @ rotation
        up = stored(taken + residual @ deflation)
        scale = weight_scale(residual.float(), FORMAT, RULE, hessian.diagonal().float())
        codes = textbook_gptq(residual, hessian, scale, FORMAT, RECIPE.damping_fraction, order)
        column_scale = scale.effective.double().repeat_interleave(FORMAT.group_size, 1)
        rounded = decode(codes, FORMAT, torch.float64) * column_scale
        effective = rounded @ rotation / factor + (up - rounded @ deflation) @ down
        made[name] = Plain(codes, effective, (residual - rounded) @ offset)
    return made


def groups_of(inputs: Inputs) -> list[tuple[str, ...]]:
    """Return the linears of the first and the last block, grouped by the input they read."""
    last = max(int(name.split(".")[1]) for name in inputs)
    names = [name for name in inputs if name.split(".")[1] in ("0", str(last))]
    together = {}
    for name in names:
        block, linear = name.split(".", 2)[1], name.split(".", 2)[2]
        group = next((group for group in WAN.shared_inputs if linear in group), (linear,))
        together.setdefault((block, group), []).append(name)
    return [tuple(group) for group in together.values()]


def test_the_streamed_layers_of_the_default_recipe_are_the_plain_ones(store: SampleStore, tmp_path: Path) -> None:
    denoiser = "high_noise"
    samples = store.samples(denoiser)
    model = ReplayedDenoiser(DenoiserWeights(SourceModel.open("tiny-outliers"), denoiser, torch.float32, "cpu"))
    blocks = quantize_denoiser(model, samples, RECIPE, TimestepBins(), HiddenStates(tmp_path, ram_bytes=0))
    streamed = {named.name: named for block in blocks for named in block.layers}
    whole = WanTransformer3DModel.from_pretrained(
        outliers_folder(), subfolder=COMPONENTS[denoiser], dtype=torch.float32
    )
    inputs = inputs_of(whole, samples)
    assert inputs.keys() == streamed.keys()
    same_codes = []
    for names in groups_of(inputs):
        x = torch.cat([x for _, x in inputs[names[0]]])
        weights = {name: whole.get_submodule(name).weight.detach().double() for name in names}
        for name, plain in plainly(weights, x).items():
            layer, source = streamed[name].layer, whole.get_submodule(name)
            same_codes.append(float((unpack(layer.packed, layer.format) == plain.codes).float().mean()))
            change = layer.effective_bias().double() - source.bias.detach().double()
            signal = x @ weights[name].T
            errors = [signal - x @ layer.dequantize().double().T - change, signal - x @ plain.weight.T - plain.bias]
            ours, other = (float(10 * torch.log10(error.square().sum())) for error in errors)
            reads_text = name.endswith(("attn2.to_k", "attn2.to_v"))
            assert abs(ours - other) < (TOLERANCE_OF_TEXTS_DB if reads_text else TOLERANCE_DB), name
    assert sum(same_codes) / len(same_codes) > CODES_OF_ALL_LAYERS and min(same_codes) > CODES_OF_EACH_LAYER, same_codes


def test_the_plain_implementation_stands_for_the_weight_and_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    spread = torch.logspace(-1, 1, 64, dtype=torch.float64)
    x = torch.randn(900, 64, generator=generator, dtype=torch.float64) * spread + 3
    plain = plainly({"a": weight}, x)["a"]
    y, wanted = x @ plain.weight.T + plain.bias, x @ weight.T
    assert float(10 * torch.log10(wanted.square().sum() / (y - wanted).square().sum())) > 20
    assert (y - wanted).mean(0).norm() < 0.05 * wanted.std(0).norm()
