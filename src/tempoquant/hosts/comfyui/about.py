"""A node's description of a loaded model."""

from typing import Any

from tempoquant.checkpoint.tensors import num_replacing_bytes
from tempoquant.hosts.comfyui.loader import loaded_of
from tempoquant.kernels.dispatch import choose


def about(patcher: Any) -> str:
    """Return a few lines on a MODEL: its kind, its size, its kernels. Raises ModelError for a model
    of another loader.
    """
    loaded = loaded_of(patcher)
    quantization = loaded.stored.header.quantization
    entries, num_bins = quantization.layers.values(), quantization.bins.num_bins
    weights = sum(entry.in_features * entry.out_features for entry in entries)
    num_bytes = sum(num_replacing_bytes(entry, num_bins) for entry in entries)
    formats = {entry.format.name: entry.format for entry in sorted(entries, key=lambda entry: entry.format.name)}
    low, high = loaded.stored.header.timesteps
    backends = {name: choose(patcher.load_device, format) for name, format in formats.items()}
    return "\n".join(
        [
            f"{quantization.denoiser} from {loaded.stored.where}",
            f"runs at timesteps {low:g} to {high:g}, in {num_bins} bin(s)",
            f"recipe {quantization.recipe.name}: {len(quantization.layers)} linears in {', '.join(formats)}, "
            f"{8 * num_bytes / max(1, weights):.2f} bits a weight, all included",
            f"{patcher.model_size() / 2**20:,.1f} MiB, the rest in {str(loaded.dtype).removeprefix('torch.')}",
            f"{patcher.num_additions} LoRA branch(es) beside the 4-bit linears",
            *(f"{name} runs by {choice.backend.value}: {choice.reason}" for name, choice in backends.items()),
        ]
    )
