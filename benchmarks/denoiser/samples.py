"""Inputs of layers at each noise level: on terrain fields that the denoiser made, with noise added
again.

The denoiser turns pure noise of sigma 80 into a field in one step; these fields, of random
difficulty, are the clean ones. Each seed has its own fields and noise.
"""

from typing import NamedTuple

import torch
from torch import nn

from benchmarks.denoiser.layers import quantized_layers, tokens_of
from benchmarks.denoiser.unet import FIELD, SIGMA_MAX, SIGMA_MIN, Denoiser, ResidualBlock
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS

NUM_SIGMAS = 8
SIGMAS = tuple(
    SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** (i / (NUM_SIGMAS - 1)) for i in range(NUM_SIGMAS)
)  # evenly spaced in the logarithm, the cleanest first


class Call(NamedTuple):
    """One call of the denoiser, at one noise level. noisy: (fields, 1, 128, 128); sigma,
    difficulty: (fields,).
    """

    noisy: torch.Tensor
    sigma: torch.Tensor
    difficulty: torch.Tensor


class Samples(NamedTuple):
    """A call at each of SIGMAS.

    Attributes:
        calls: the denoiser's inputs.
        outputs: its network's outputs, (fields, 1, 128, 128) each.
        tokens: its layers' inputs, {layer: (tokens, in) at each of SIGMAS}.
    """

    calls: list[Call]
    outputs: list[torch.Tensor]
    tokens: dict[str, list[torch.Tensor]]


def timestep_of(index: int) -> float:
    """Return the timestep, 0 … 1000, of the sigma of that index: the middle of one of NUM_SIGMAS
    intervals.
    """
    return NUM_TRAIN_TIMESTEPS * (index + 0.5) / NUM_SIGMAS


def by_bin(tokens: list[torch.Tensor], num_bins: int) -> dict[int, torch.Tensor]:
    """Group tokens at each of SIGMAS by timestep bin, with bins that divide the timesteps
    equally.
    """
    bins = [int(timestep_of(i) * num_bins / NUM_TRAIN_TIMESTEPS) for i in range(NUM_SIGMAS)]
    return {b: torch.cat([tokens[i] for i in range(NUM_SIGMAS) if bins[i] == b]) for b in range(num_bins)}


@torch.no_grad()
def take(denoiser: Denoiser, num_fields: int, num_tokens: int, seed: int) -> Samples:
    """Draw clean fields with a seed, add noise of each level, and keep at most so many tokens of
    each layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(num_fields, 1, FIELD, FIELD, generator=generator)

    difficulty = torch.rand(num_fields, generator=generator)
    clean = denoiser(noise() * SIGMA_MAX, torch.full((num_fields,), SIGMA_MAX), difficulty)
    layers = dict(quantized_layers(denoiser))
    samples = Samples([], [], {name: [] for name in layers})
    for sigma in SIGMAS:
        call = Call(clean + noise() * sigma, torch.full((num_fields,), sigma), difficulty)
        output, inputs = _call(denoiser, layers, call, torch.rand(num_tokens, generator=generator))
        samples.calls.append(call)
        samples.outputs.append(output)
        for name, layer in layers.items():
            tokens = tokens_of(layer, inputs.pop(name))
            chosen = torch.randperm(len(tokens), generator=generator)[:num_tokens]
            samples.tokens[name].append(tokens[chosen])
    return samples


def _call(
    denoiser: Denoiser, layers: dict[str, nn.Linear | nn.Conv2d], call: Call, difficulties: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the network's output, and each layer's input; linears that read one token a field get
    `difficulties`.
    """
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    output = denoiser.network(*call)
    embedding = denoiser.model.embed(call.sigma[:1], difficulties)
    for block in denoiser.modules():
        if isinstance(block, ResidualBlock):
            block.emb_layers(embedding)
    for handle in handles:
        handle.remove()
    return output, inputs
