"""Loading a pipeline in a memory mode, by whatever people call a model."""

from typing import Any

from tempoquant.device import default_device
from tempoquant.errors import SettingsError
from tempoquant.hosts.diffusers.pipeline import open_pipeline
from tempoquant.models.with_experts import ModelName
from tempoquant.placement.memory_modes import load_in_mode
from tempoquant.placement.modes import MEMORY_MODES, Memory


def load_pipeline(
    model: ModelName, mode: Memory = "resident", device: str | None = None, in_chunks: bool = True
) -> Any:
    """Load a pipeline, 16-bit or quantized, and set its memory mode; in "disk" no denoiser's
    weights are loaded.

    Args:
        model: a bundled model's name, a folder, or a hub id.
        mode, device, in_chunks: as of `set_memory_mode`.

    Raises:
        ModelError: there is no such model, it is not what a family can run, or it does not load.
        CheckpointError: a quantized denoiser is damaged.
        SettingsError, UnsupportedError: as `set_memory_mode`; or "disk" for a pipeline exported for
            other kernels.
    """
    if mode not in MEMORY_MODES:
        raise SettingsError(f"memory is one of {', '.join(MEMORY_MODES)}, not {mode!r}.")
    return load_in_mode(open_pipeline(model), mode, device or default_device(), in_chunks)
