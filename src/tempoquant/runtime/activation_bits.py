"""Eight-bit activations where quality matters more: the same checkpoint runs as W4A8."""

import math
from typing import Any

from torch import nn

from tempoquant.errors import RecipeError, UnsupportedError
from tempoquant.runtime.convert import quantized_linears
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS


def set_activation_bits(model: Any, bits: int, timesteps: tuple[float, float] | None = None) -> None:
    """Set the activation bits of 4-bit linears from the model's next call on.

    On FP8 and INT8 tensor cores eight bits take the time of four. A result with eight bits is W4A8,
    not W4A4.

    Args:
        model: one model, or a diffusers pipeline with its denoisers.
        bits: 4 or 8.
        timesteps: (low, high) of the scheduler's timesteps, 0 clean to 1000 noise: eight bits where
            low ≤ timestep < high and four elsewhere; None for everywhere. With 4 bits it must be
            None.

    Raises:
        RecipeError: other bits, or timesteps that are no interval.
        UnsupportedError: the model has no 4-bit linear.
    """
    interval = eight_bit_timesteps(bits, timesteps)
    modules = [model] if isinstance(model, nn.Module) else model.components.values()
    linears = [
        linear for module in modules if isinstance(module, nn.Module) for linear in quantized_linears(module).values()
    ]
    clocks = {id(linear.clock): linear.clock for linear in linears}
    if not clocks:
        raise UnsupportedError(f"{type(model).__name__} has no 4-bit linear whose activations could have {bits} bits.")
    for clock in clocks.values():
        clock.eight_bit_timesteps = interval


def eight_bit_timesteps(bits: int, timesteps: tuple[float, float] | None = None) -> tuple[float, float] | None:
    """Return the interval of timesteps with eight bits, for arguments as in `set_activation_bits`;
    None for none.

    Raises RecipeError for other bits, or timesteps that are no interval.
    """
    if bits not in (4, 8):
        raise RecipeError(f"activations have 4 or 8 bits, not {bits}.")
    if timesteps is not None and (bits == 4 or not 0 <= timesteps[0] < timesteps[1]):
        raise RecipeError(
            f"timesteps {timesteps} with {bits} bits: give low < high, 0 to {NUM_TRAIN_TIMESTEPS}, with 8 bits only."
        )
    return None if bits == 4 else timesteps or (-math.inf, math.inf)
