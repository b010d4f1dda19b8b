"""TempoQuant: timestep-aware 4-bit weights and activations (W4A4) for video diffusion transformers.

Importing this package registers its quantizer with diffusers; from then on plain
`WanImageToVideoPipeline.from_pretrained(folder)` loads what `quantize` wrote.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tempoquant.errors import TempoQuantError
from tempoquant.integrations.diffusers_loader import register
from tempoquant.recipe import Recipe
from tempoquant.runtime.activation_bits import set_activation_bits
from tempoquant.runtime.linear import QuantizedLinear

if TYPE_CHECKING:
    from tempoquant.quantizing import quantize, quantize_linear

__version__ = version("tempoquant")

__all__ = [
    "QuantizedLinear", "Recipe", "TempoQuantError", "__version__", "quantize", "quantize_linear",
    "set_activation_bits",
]  # fmt: skip

register()


def __getattr__(name: str) -> Any:
    """The two verbs, on first use: they need diffusers' pipelines, which a loader of one model need not wait for."""
    if name in ("quantize", "quantize_linear"):
        from tempoquant import quantizing

        return getattr(quantizing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
