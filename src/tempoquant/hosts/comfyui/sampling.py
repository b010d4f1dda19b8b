"""Changes of a loaded MODEL by nodes: wider activations in some of its calls, and the step that
changes experts.
"""

import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP

from tempoquant.errors import SettingsError
from tempoquant.hosts.comfyui.loader import loaded_of
from tempoquant.hosts.comfyui.split import boundary_of, split_step
from tempoquant.runtime.activation_bits import eight_bit_timesteps
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS

_KEY = "tempoquant"


def with_activation_bits(patcher: Any, bits: int, low: float, high: float) -> Any:
    """Return a clone of a MODEL whose activations have `bits` bits where low ≤ timestep < high, and
    four elsewhere.

    A high of 1000 means no end.

    Other clones of the same model, which share its layers, are unchanged: the width is set for each
    call.

    Raises:
        RecipeError: other bits than 4 and 8, or no interval.
        ModelError: TempoQuant did not load the model.
    """
    clock = loaded_of(patcher).clock
    until = math.inf if high >= NUM_TRAIN_TIMESTEPS else high  # the first step may be at 1000 itself
    interval = eight_bit_timesteps(bits, (low, until) if bits == 8 else None)

    def call(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, clock.eight_bit_timesteps = clock.eight_bit_timesteps, interval
        try:
            return executor(*args, **kwargs)
        finally:
            clock.eight_bit_timesteps = before

    clone = patcher.clone()
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, _KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, call)
    return clone


def split_step_of(patcher: Any, scheduler: str, num_steps: int) -> int:
    """Return how many of a sampler's steps belong to the noisier of two experts.

    Args:
        patcher: either expert, with its sampling shift.
        scheduler: of ComfyUI's, as the sampler takes it.

    Raises:
        ModelError: TempoQuant did not load the model.
        SettingsError: it is not one of two experts, or it has all the steps.
    """
    stored = loaded_of(patcher).stored
    boundary = boundary_of(stored.header.timesteps, stored.name)
    model_sampling = patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, scheduler, num_steps)
    timesteps = model_sampling.timestep(sigmas[:-1]).tolist()
    split = split_step(timesteps, boundary)
    if not 0 < split < len(timesteps):
        raise SettingsError(
            f"all {len(timesteps)} steps lie on one side of the boundary {boundary:g}, from {timesteps[0]:.0f} to "
            f"{timesteps[-1]:.0f}: take more steps, or another shift."
        )
    return split
