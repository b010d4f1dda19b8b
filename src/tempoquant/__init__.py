"""TempoQuant: timestep-aware 4-bit weights and activations (W4A4) for video diffusion transformers.

Importing this package registers its quantizer with diffusers; from then on plain
`WanImageToVideoPipeline.from_pretrained(folder)` loads what `quantize` wrote.
"""

from importlib.metadata import version

__version__ = version("tempoquant")

from tempoquant.errors import TempoQuantError
from tempoquant.integrations.diffusers_loader import register
from tempoquant.layer import QuantizedLayer
from tempoquant.quantizing import quantize, quantize_linear
from tempoquant.recipe import Recipe

register()

__all__ = ["QuantizedLayer", "Recipe", "TempoQuantError", "__version__", "quantize", "quantize_linear"]
