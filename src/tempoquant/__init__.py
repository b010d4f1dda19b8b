"""TempoQuant: timestep-aware 4-bit weights and activations (W4A4) for video diffusion transformers.

Importing this package registers its quantizer with diffusers; from then on plain
`WanImageToVideoPipeline.from_pretrained(folder)` loads what `quantize` wrote.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tempoquant.errors import TempoQuantError
from tempoquant.registration import register_on_import

if TYPE_CHECKING:
    from tempoquant.acceleration import accelerate
    from tempoquant.models.with_experts import WithExperts
    from tempoquant.placement.memory_modes import set_memory_mode
    from tempoquant.quantizing import quantize, quantize_linear
    from tempoquant.recipe import Recipe
    from tempoquant.runtime.activation_bits import set_activation_bits
    from tempoquant.runtime.linear import QuantizedLinear

__version__ = version("tempoquant")

__all__ = [
    "QuantizedLinear",
    "Recipe",
    "TempoQuantError",
    "WithExperts",
    "__version__",
    "accelerate",
    "load_pipeline",
    "quantize",
    "quantize_linear",
    "set_activation_bits",
    "set_memory_mode",
]

_ON_FIRST_USE = {
    "QuantizedLinear": "tempoquant.runtime.linear",
    "Recipe": "tempoquant.recipe",
    "WithExperts": "tempoquant.models.with_experts",
    "accelerate": "tempoquant.acceleration",
    "load_pipeline": "tempoquant.placement.loading",
    "quantize": "tempoquant.quantizing",
    "quantize_linear": "tempoquant.quantizing",
    "set_activation_bits": "tempoquant.runtime.activation_bits",
    "set_memory_mode": "tempoquant.placement.memory_modes",
}

register_on_import()


def __getattr__(name: str) -> Any:
    """Import what a name stands for when it is first used: the import takes torch or diffusers,
    which not every caller needs.
    """
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
