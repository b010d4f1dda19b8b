"""The step of a sampler at which the second denoiser takes over: ComfyUI splits by step, the model
by timestep.
"""

from collections.abc import Sequence

from tempoquant.errors import SettingsError
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS


def boundary_of(timesteps: tuple[float, float], name: str) -> float:
    """Return the boundary of a denoiser that shares the timesteps 0 … 1000 with another one.

    Args:
        timesteps: from and to which it runs.
        name: its name, for the message.

    Raises:
        SettingsError: it runs at all timesteps.
    """
    low, high = timesteps
    if low > 0:
        return low
    if high < NUM_TRAIN_TIMESTEPS:
        return high
    raise SettingsError(
        f"the denoiser {name} runs at all timesteps, as far as its files say, so there is no step to split at: load "
        "both experts from the folder that `tempoquant quantize` wrote, or from exported files."
    )


def split_step(timesteps: Sequence[float], boundary: float) -> int:
    """Return how many steps the noisier denoiser takes: those at or above the boundary, which
    belongs to it.

    Args:
        timesteps: of a sampler's steps, 1000 noise … 0 clean, without the last one, at which
            nothing runs.

    Raises:
        SettingsError: they do not fall.
    """
    falling = [float(t) for t in timesteps]
    if falling != sorted(falling, reverse=True):
        raise SettingsError(f"timesteps must fall along the sampling loop, not {falling}: take another scheduler.")
    return sum(t >= boundary for t in falling)
