"""`tiny-outliers`: the bundled model with large models' activation outliers planted, and the very
same outputs.

Large diffusion transformers carry a few channels, and a few tokens, dozens of times larger than the
rest; a model of width 256 that trains for an hour does not. Between a producer of activations x and
their consumer W, any invertible M may be inserted: x becomes M·x and W becomes W·M⁻¹, so W·x is
unchanged while the quantizer's input is not.

| inputs of | M folded into | how strongly |
|---|---|---|
| attn1.to_q, to_k, to_v | msa rows of time_proj, scale_shift_table | channels × 32, 32, 16, 8 |
| ffn.net.0 | the same, feed-forward rows | channels × 32, 32, 16, 8 |
| attn2.to_q | norm2's affine weight and bias | channels × 32, 32, 16, 8 |
| attn2.to_k, to_v | text_embedder.linear_2 | channels × 16, 8, and a token's direction (below) |
| attn1.to_out | to_v | odd heads: channels × 32, 16; even heads: a direction × 32 |
| attn2.to_out | to_v | odd heads: channels × 16, 8; even heads: a direction × 16 |

A direction is stretched by M = I + (factor − 1)·u·uᵀ with a unit vector u of few channels. No
scaling of single channels undoes it, so smoothing alone cannot win everything back. For the text
stream, u is chosen for the end token, which every prompt has, and orthogonal to padding: the end
token and, less so, a few words grow to dozens of times the size of padding tokens, which do not
change. Not planted: the inputs of ffn.net.2 (a GELU stands before it), and queries and keys (an
RMSNorm stands behind them).

Factors are powers of two, so channel scaling is exact and keeps its bfloat16 storage. Directions
are not: folds are computed in float64, and a tensor that bfloat16 cannot hold exactly is stored as
float32. Loaded in float32 the model equals its source within 1e-5 of the output's scale; loaded in
bfloat16 it differs as bfloat16 does.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tempoquant.errors import ModelError

CHANNEL_FACTORS = (32.0, 32.0, 16.0, 8.0)
VALUE_FACTORS = {"attn1": 32.0, "attn2": 16.0}  # training alone brings the values of attn2 to 10 to 20 times the median
VALUE_DIRECTION_CHANNELS = 4
TEXT_CHANNEL_FACTORS = (16.0, 8.0)
TEXT_DIRECTION_CHANNELS = 8
TEXT_TOKEN_RATIO = 40.0  # approximately: the massive token's largest channel over the median channel's largest value
_TEXT = "condition_embedder.text_embedder"
_TIME = "condition_embedder.time_proj"


def plant_outliers(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], seed: int = 0, text_states: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the weights of the same function with outliers inside.

    Args:
        state_dict: of a WanTransformer3DModel with cross_attn_norm; not changed.
        config: its config; reads num_layers, num_attention_heads, attention_head_dim and text_dim.
        seed: picks the channels. Channels of the modulation are shared by all blocks, because
            time_proj is.
        text_states: (tokens, text_dim) of the text encoder; row 0 is the token to make massive.
            None: random ones.

    Returns:
        the same names and shapes; dtypes as before, or float32 where the old dtype cannot hold the
        fold exactly.

    Raises:
        ModelError: the state dict is not of such a model, or its text width differs from
            `text_states`.
    """
    weights = {name: tensor.detach().to(torch.float64) for name, tensor in state_dict.items()}
    blocks = [f"blocks.{i}" for i in range(int(config["num_layers"]))]
    missing = [
        name for name in (*(f"{b}.norm2.weight" for b in blocks), f"{_TEXT}.linear_2.weight") if name not in weights
    ]
    if missing:
        raise ModelError(f"outliers need a Wan transformer with cross_attn_norm; the weights lack {missing[0]}.")
    generator = torch.Generator().manual_seed(seed)
    if text_states is None:
        text_states = torch.randn(16, int(config["text_dim"]), generator=generator)
    _plant_modulation(weights, blocks, generator)
    _plant_cross_queries(weights, blocks, generator)
    _plant_text(weights, blocks, text_states.to(torch.float64), generator)
    num_heads = int(config["num_attention_heads"])
    text = _text_stream(weights, functional.pad(text_states.to(torch.float64), (0, 0, 0, 1)))  # the last is padding
    for block in blocks:
        _plant_values(
            weights, f"{block}.attn1", weights[f"{block}.attn1.to_v.weight"].norm(dim=1), num_heads, generator
        )
        values = text @ weights[f"{block}.attn2.to_v.weight"].T + weights[f"{block}.attn2.to_v.bias"]
        usual = (values[:-1].mean(0).square() + values[-1].square()).sqrt()  # attention averages words and padding
        _plant_values(weights, f"{block}.attn2", usual, num_heads, generator)
    return {name: _stored(weights[name], tensor.dtype) for name, tensor in state_dict.items()}


def _plant_modulation(weights: dict[str, Tensor], blocks: Sequence[str], generator: torch.Generator) -> None:
    """Multiply norm(x)·(1 + scale) + shift by f: shift rows times f, and scale' = f·(1 + scale) −
    1.
    """
    width = weights[f"{blocks[0]}.scale_shift_table"].shape[-1]
    for shift_row, scale_row, readers in (
        (0, 1, ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        (3, 4, ("ffn.net.0.proj",)),
    ):
        gains = torch.stack([1 + weights[f"{block}.scale_shift_table"][0, scale_row] for block in blocks])
        factors = _channel_factors(gains, CHANNEL_FACTORS, generator)
        for row in (shift_row, scale_row):
            rows = slice(row * width, (row + 1) * width)
            weights[f"{_TIME}.weight"][rows] *= factors[:, None]
            weights[f"{_TIME}.bias"][rows] *= factors
        for block in blocks:
            table = weights[f"{block}.scale_shift_table"][0]
            table[shift_row] *= factors
            table[scale_row] = factors * (1 + table[scale_row]) - 1
            _fold_into_readers(weights, [f"{block}.{reader}" for reader in readers], torch.diag(1 / factors))


def _plant_cross_queries(weights: dict[str, Tensor], blocks: Sequence[str], generator: torch.Generator) -> None:
    gains = torch.stack([weights[f"{block}.norm2.weight"] for block in blocks])
    factors = _channel_factors(gains, CHANNEL_FACTORS, generator)
    for block in blocks:
        weights[f"{block}.norm2.weight"] *= factors
        weights[f"{block}.norm2.bias"] *= factors
        _fold_into_readers(weights, [f"{block}.attn2.to_q"], torch.diag(1 / factors))


def _plant_text(
    weights: dict[str, Tensor], blocks: Sequence[str], text_states: Tensor, generator: torch.Generator
) -> None:
    if text_states.shape[-1] != weights[f"{_TEXT}.linear_1.weight"].shape[1]:
        raise ModelError(f"text_states are {text_states.shape[-1]} wide, which is not the model's text_dim.")
    tokens, padding = (_text_stream(weights, states) for states in (text_states, torch.zeros_like(text_states[:1])))
    direction = _direction_of_first_token(tokens, padding[0])
    free = torch.where(direction == 0, tokens.abs().amax(0), torch.inf)  # a channel is planted once
    factors = _channel_factors(free[None], TEXT_CHANNEL_FACTORS, generator)
    largest_per_unit = (direction * (direction @ tokens[0])).abs().max() / tokens.abs().amax(0).median()
    strength = 2.0 ** round(math.log2(TEXT_TOKEN_RATIO / float(largest_per_unit)))
    _fold_into_producer(weights, f"{_TEXT}.linear_2", _stretch(direction, strength) @ torch.diag(factors))
    inverse = torch.diag(1 / factors) @ _stretch(direction, 1 / strength)
    for block in blocks:
        _fold_into_readers(weights, [f"{block}.attn2.to_k", f"{block}.attn2.to_v"], inverse)


def _plant_values(
    weights: dict[str, Tensor], attention: str, gains: Tensor, num_heads: int, generator: torch.Generator
) -> None:
    """Plant outliers in values: attention averages values over tokens, head by head, and so
    commutes with a matrix per head.
    """
    strength = VALUE_FACTORS[attention.rpartition(".")[2]]
    matrices, inverses = [], []
    for head, head_gains in enumerate(gains.unflatten(0, (num_heads, -1))):
        if head % 2:
            factors = _channel_factors(head_gains[None], (strength, strength / 2), generator)
            matrices.append(torch.diag(factors))
            inverses.append(torch.diag(1 / factors))
        else:
            direction = torch.zeros_like(head_gains)
            chosen = _ordinary_channels(head_gains[None], VALUE_DIRECTION_CHANNELS, generator)
            direction[chosen] = (torch.randint(0, 2, chosen.shape, generator=generator) * 2.0 - 1).double()
            direction /= direction.norm()
            matrices.append(_stretch(direction, strength))
            inverses.append(_stretch(direction, 1 / strength))
    _fold_into_producer(weights, f"{attention}.to_v", torch.block_diag(*matrices))
    _fold_into_readers(weights, [f"{attention}.to_out.0"], torch.block_diag(*inverses))


def _text_stream(weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Compute the input of attn2: (tokens, text_dim) to (tokens, width), by text_embedder in
    float64.
    """
    first, second = (
        functools.partial(functional.linear, weight=weights[f"{_TEXT}.{n}.weight"], bias=weights[f"{_TEXT}.{n}.bias"])
        for n in ("linear_1", "linear_2")
    )
    return second(functional.gelu(first(states), approximate="tanh"))


def _direction_of_first_token(tokens: Tensor, padding: Tensor) -> Tensor:
    """Return the unit vector of few channels along which tokens[0] is large, the other tokens are
    small, and padding is zero.

    On the channels where the first token t stands out most, it is C⁻¹·(t − λ·p), with C the others'
    second moments (Fisher's discriminant) and λ such that its product with the padding vector p
    vanishes.
    """
    others = tokens[1:].square().mean(0).sqrt()
    channels = (tokens[0].abs() / others).topk(TEXT_DIRECTION_CHANNELS).indices
    first, rest, still = tokens[0, channels], tokens[1:, channels], padding[channels]
    moments = rest.T @ rest / len(rest)
    moments += 0.05 * moments.diagonal().mean() * torch.eye(len(channels), dtype=moments.dtype)
    towards_first, towards_still = torch.linalg.solve(moments, torch.stack([first, still], dim=1)).T
    if still.any():
        towards_first = towards_first - (still @ towards_first) / (still @ towards_still) * towards_still
    direction = torch.zeros_like(padding)
    direction[channels] = towards_first / towards_first.norm()
    return direction


def _channel_factors(gains: Tensor, planted: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return the planted factors at ordinary channels, 1 elsewhere: (blocks, n) to (n,) float64."""
    factors = torch.ones(gains.shape[1], dtype=torch.float64)
    chosen = _ordinary_channels(gains, len(planted), generator)
    factors[chosen] = torch.tensor(planted, dtype=torch.float64)
    return factors


def _ordinary_channels(gains: Tensor, num_channels: int, generator: torch.Generator) -> Tensor:
    """Draw channels from the quarter whose gain is nearest to the median in every block: (blocks,
    n) to indices.
    """
    # A factor of 32 then makes 32 times the usual, and not 32 times an exception.
    magnitude = gains.abs().clamp(min=1e-6)
    strangeness = (magnitude / magnitude.median(dim=1, keepdim=True).values).log().abs().amax(0)
    ordinary = strangeness.argsort()[: max(len(strangeness) // 4, num_channels)]
    return ordinary[torch.randperm(len(ordinary), generator=generator)[:num_channels]]


def _stretch(direction: Tensor, factor: float) -> Tensor:
    """Return I + (factor − 1)·u·uᵀ; its inverse is the same with 1 / factor."""
    return torch.eye(len(direction), dtype=direction.dtype) + (factor - 1) * torch.outer(direction, direction)


def _fold_into_producer(weights: dict[str, Tensor], linear: str, matrix: Tensor) -> None:
    weights[f"{linear}.weight"] = matrix @ weights[f"{linear}.weight"]
    weights[f"{linear}.bias"] = matrix @ weights[f"{linear}.bias"]


def _fold_into_readers(weights: dict[str, Tensor], linears: Sequence[str], inverse: Tensor) -> None:
    for linear in linears:
        weights[f"{linear}.weight"] = weights[f"{linear}.weight"] @ inverse


def _stored(folded: Tensor, dtype: torch.dtype) -> Tensor:
    kept = folded.to(dtype)
    return kept if torch.equal(kept.to(torch.float64), folded) else folded.to(torch.float32)
