"""One row with one seed: quantize every layer on some fields, judge each layer and the whole
network on others.
"""

import contextlib
import copy
import time
from typing import Any

import torch

from benchmarks.denoiser.layers import as_matrix, matrix_of, quantized_layers
from benchmarks.denoiser.rows import Row
from benchmarks.denoiser.samples import Samples, by_bin, timestep_of
from benchmarks.denoiser.unet import Denoiser
from tempoquant.quantizing.linear import quantize_linear
from tempoquant.runtime.linear import QuantizedLinear

Layers = dict[str, QuantizedLinear]


def measure(row: Row, denoiser: Denoiser, calibration: Samples, held_out: Samples) -> dict[str, Any]:
    """Measure relative errors, norm over norm, at each noise level: of the network, of the denoised
    field, of every layer.
    """
    start = time.perf_counter()
    layers = quantize(row, denoiser, calibration)
    network, denoised = errors_of_network(denoiser, layers, held_out)
    return {
        "row": row.label,
        "bits_per_weight": 8
        * sum(layer.num_bytes for layer in layers.values())
        / sum(layer.in_features * layer.out_features for layer in layers.values()),
        "network": network,
        "denoised": denoised,
        "layers": errors_of_layers(denoiser, layers, held_out),
        "seconds": time.perf_counter() - start,
    }


def quantize(row: Row, denoiser: Denoiser, calibration: Samples) -> Layers:
    """Quantize every layer, by name, each calibrated on its input in the network at full
    precision.
    """
    layers = {}
    for name, layer in quantized_layers(denoiser):
        matrix = matrix_of(layer)
        inputs = by_bin(calibration.tokens[name], row.num_bins)
        layers[name] = quantize_linear(matrix, layer.bias, inputs, row.recipe_of(matrix.shape))
    return layers


@torch.no_grad()
def errors_of_network(denoiser: Denoiser, layers: Layers, held_out: Samples) -> tuple[list[float], list[float]]:
    """Measure errors of the network's output and of the denoised field, with all quantized layers
    in place, at each noise level.
    """
    quantized = copy.deepcopy(denoiser)
    for name, layer in quantized_layers(denoiser):
        quantized.set_submodule(name, as_matrix(layer, layers[name]))
    network, denoised = [], []
    for index, (call, wanted) in enumerate(zip(held_out.calls, held_out.outputs, strict=True)):
        with contextlib.ExitStack() as stack:
            for layer in layers.values():
                stack.enter_context(layer.at_timestep(timestep_of(index)))
            found = quantized.network(*call)
        network.append(relative_error(found, wanted))
        fields = (denoiser.denoised(output, call.noisy, call.sigma) for output in (found, wanted))
        denoised.append(relative_error(*fields))
    return network, denoised


@torch.no_grad()
def errors_of_layers(denoiser: Denoiser, layers: Layers, held_out: Samples) -> dict[str, list[float]]:
    """Measure errors of each layer's output without its bias, on its input in the network at full
    precision.
    """
    errors = {}
    for name, layer in quantized_layers(denoiser):
        errors[name] = []
        bias = 0 if layer.bias is None else layer.bias
        for index, tokens in enumerate(held_out.tokens[name]):
            with layers[name].at_timestep(timestep_of(index)):
                found = layers[name](tokens) - bias
            errors[name].append(relative_error(found, tokens @ matrix_of(layer).T))
    return errors


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Compute ‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).norm() / wanted.norm())
