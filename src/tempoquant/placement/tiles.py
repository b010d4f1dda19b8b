"""The tiles in which autoencoders work, under any name of their settings."""

import inspect
from collections.abc import Callable
from typing import Any

TILE_PIXELS = 192
TILE_STRIDE = 144
"""The stride of the autoencoder's square tiles; they overlap by a quarter, as diffusers' own of 256
pixels do. Larger ones would take more memory than denoising at 480 × 832.
"""


def tile_stride(pixels: int) -> int:
    """Return the stride of the autoencoder's tiles: whole latents, each of so many pixels."""
    return TILE_STRIDE - TILE_STRIDE % pixels


def use_tiles(vae: Any) -> Callable[[], None]:
    """Make an autoencoder work in tiles of TILE_PIXELS, if it supports tiles; return a function
    that undoes it.
    """
    taken = inspect.signature(vae.enable_tiling).parameters if hasattr(vae, "enable_tiling") else {}
    if "tile_sample_min_height" not in taken:  # an image's
        return lambda: None
    before = {name: value for name, value in vars(vae).items() if name == "use_tiling" or name.startswith("tile_")}
    pixels = vae.spatial_compression_ratio
    stride = tile_stride(pixels)
    sizes = {
        "sample_min": TILE_PIXELS,
        "latent_min": TILE_PIXELS // pixels,
        "sample_stride": stride,
        "sample_min_overlap": TILE_PIXELS - stride,
    }
    settings = {f"tile_{what}_{side}": size for what, size in sizes.items() for side in ("height", "width")}
    settings["tile_overlap_factor"] = 1 - stride / TILE_PIXELS
    vae.enable_tiling(**{name: value for name, value in settings.items() if name in taken})

    def undo() -> None:
        for name, value in before.items():
            setattr(vae, name, value)

    return undo
