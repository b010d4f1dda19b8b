"""The layers that are quantized, as the matrices they are: linears, 1×1 convolutions, 3×3
convolutions by im2col.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from benchmarks.denoiser.unet import Denoiser

KINDS = {
    "skip_connection": "skip",
    "emb_layers.1": "embedding",
    "qkv": "attention",
    "proj_out": "attention",
    "in_layers.2": "convolution",
    "out_layers.3": "convolution",
}
"""The kind of a quantized layer, by the ending of its name."""
MIN_CHANNELS = 64
"""Outputs of the smallest 3×3 convolutions that are quantized: narrower ones hold few weights and
most of the time.
"""


class Im2ColConvolution(nn.Module):
    """A convolution of stride 1 that keeps the field's size, computed by a linear on its patches.

    Attributes:
        linear: (…, in · kernel²) to (…, out).
        kernel: rows and columns of a patch, an odd number.
    """

    def __init__(self, linear: nn.Module, kernel: int) -> None:
        super().__init__()
        self.linear, self.kernel = linear, kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(patches(x, self.kernel)).transpose(1, 2).unflatten(2, x.shape[2:])


def patches(x: torch.Tensor, kernel: int) -> torch.Tensor:
    """Convert (batch, channels, height, width) to (batch, height · width, channels · kernel²),
    zeros outside the field.
    """
    return functional.unfold(x, kernel, padding=kernel // 2).transpose(1, 2)


def matrix_of(layer: nn.Linear | nn.Conv2d) -> torch.Tensor:
    """Return the weight that multiplies a patch: (out, in · kernel²)."""
    return layer.weight.flatten(1)


def tokens_of(layer: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return the tokens that `matrix_of` multiplies for the input x: (tokens, in · kernel²)."""
    return x if isinstance(layer, nn.Linear) else patches(x, layer.kernel_size[0]).flatten(0, 1)


def as_matrix(layer: nn.Linear | nn.Conv2d, linear: nn.Module) -> nn.Module:
    """Return a replacement of the layer that computes it by `linear`, which has its `matrix_of` and
    its bias.
    """
    return linear if isinstance(layer, nn.Linear) else Im2ColConvolution(linear, layer.kernel_size[0])


def kind_of(name: str) -> str:
    """Return the kind of a quantized layer: one of the values of KINDS."""
    return next(kind for ending, kind in KINDS.items() if name.endswith(ending))


def quantized_layers(denoiser: Denoiser) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield names and modules of the layers to quantize."""
    for name, module in denoiser.named_modules():
        if not name.endswith(tuple(KINDS)) or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if kind_of(name) != "convolution" or len(module.weight) >= MIN_CHANNELS:
            yield name, module
