"""Round to nearest: the rounding that reads only the weight (OCP MX v1.0, section 6.3)."""

import torch

from tempoquant.formats import Format, WeightScale, to_codes


def round_to_nearest(residual_weight: torch.Tensor, scale: WeightScale, format: Format) -> torch.Tensor:
    """Return the nearest codes of a weight (out, in) float32 under fixed scales: (out, in) int8."""
    return to_codes(residual_weight, scale.effective, format)
