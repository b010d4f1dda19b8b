"""NamedLayer: a linear's 4-bit layer under its name, and what its calibration found."""

from typing import NamedTuple

import torch

from tempoquant.layer import HardlySeen, QuantizedLayer


class NamedLayer(NamedTuple):
    """A finished layer and its name.

    Attributes:
        name: in the denoiser.
        layer: replaces the linear.
        needed_float64: its Hessian was too ill-conditioned for float32.
        bias_correction: (out,) or (num_bins, out) float32, what the layer adds to the linear's
            bias; None for nothing.
        hardly_seen: features that calibration hardly saw; None for none.
    """

    name: str
    layer: QuantizedLayer
    needed_float64: bool
    bias_correction: torch.Tensor | None
    hardly_seen: HardlySeen | None = None
