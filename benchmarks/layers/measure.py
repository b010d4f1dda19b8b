"""Errors of one network's layers under each recipe, on the tokens held out."""

import math
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.layers.layer import Layer
from benchmarks.layers.rows import PAPER
from tempoquant.quantizing.linear import quantize_linear
from tempoquant.recipe import Recipe

QUIETEST = 1e-3
"""The least signal that a token's error is compared with, as a fraction of the mean: a token may be
almost silent.
"""


class Error(NamedTuple):
    """Error power over signal power of a layer's output, dB: of all tokens together, and of the
    worst one.
    """

    all_db: float
    worst_token_db: float


def error_of(layer: Layer, recipe: Recipe) -> Error:
    """Quantize a layer and judge its output, without the bias, on the tokens held out."""
    weight = layer.linear.weight.detach()
    quantized = quantize_linear(weight, None, layer.fit, recipe)
    wanted = layer.test @ weight.T
    error, signal = (values.square().sum(dim=1) for values in (quantized(layer.test) - wanted, wanted))
    worst = (error / signal.clamp_min(QUIETEST * float(signal.mean()))).max()
    return Error(_db(error.sum() / signal.sum()), _db(worst))


def _db(ratio: torch.Tensor) -> float:
    return 10 * math.log10(float(ratio))


def measure(layers: Mapping[str, Layer], rows: Mapping[str, Recipe]) -> list[dict[str, Any]]:
    """Make one record a row, dB: mean over layers, each layer, paired difference to PAPER, the
    worst layers and tokens.
    """
    results: list[dict[str, Any]] = []
    for label, recipe in rows.items():
        start = time.perf_counter()
        errors = {name: error_of(layer, recipe) for name, layer in layers.items()}
        each = {name: error.all_db for name, error in errors.items()}
        tokens = {name: error.worst_token_db for name, error in errors.items()}
        worst = max(each, key=each.__getitem__)
        results.append(
            {
                "row": label,
                "error_db": statistics.fmean(each.values()),
                "each_db": each,
                "worst_layer": worst,
                "worst_layer_db": each[worst],
                "each_worst_token_db": tokens,
                "worst_token_mean_db": statistics.fmean(tokens.values()),
                "worst_token_db": max(tokens.values()),
                "seconds": time.perf_counter() - start,
            }
        )
    [paper] = [result["each_db"] for result in results if result["row"] == PAPER]
    for result in results:
        less = [paper[name] - value for name, value in result["each_db"].items()]
        result |= {"less_than_paper_db": statistics.fmean(less), "least_of_all_layers_db": min(less)}
    return results
