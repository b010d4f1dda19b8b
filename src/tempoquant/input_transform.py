"""InputTransform: what a 4-bit linear does to its input before it rounds it.

    h = x · downᵀ
    z = H(x / smoothing_factor) − h · deflationᵀ − input_offset

H is the block rotation (`formats.rotation`). What a layer does not have is left out. z is rounded to four bits; h goes
on to the branch in 16. Calibration settles the transform step by step, a layer keeps it, and kernels are held to it.
"""

from typing import NamedTuple

import torch

from tempoquant.exact_products import exact_linear
from tempoquant.formats import rotate


class InputTransform(NamedTuple):
    """What linears that share a quantized input have in common.

    Attributes:
        smoothing_factor: (in,), or None.
        rotated: whether the smoothed input is rotated in blocks; deflation and input_offset are then of the rotated
            features, as the weight is.
        down: (rank, in), or None without a branch; already holds 1 / smoothing_factor, and reads the raw input.
        deflation: (in, rank), or (num_bins, in, rank), one for each timestep bin; None for none.
        input_offset: (in,), or (num_bins, in), one for each timestep bin; None for none.
    """

    smoothing_factor: torch.Tensor | None = None
    rotated: bool = False
    down: torch.Tensor | None = None
    deflation: torch.Tensor | None = None
    input_offset: torch.Tensor | None = None

    def at_bin(self, timestep_bin: int) -> "InputTransform":
        """The transform of one timestep bin, sharing memory."""
        deflation, offset = self.deflation, self.input_offset
        if deflation is not None and deflation.dim() == 3:
            deflation = deflation[timestep_bin]
        if offset is not None and offset.dim() == 2:
            offset = offset[timestep_bin]
        return self._replace(deflation=deflation, input_offset=offset)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute z, what is rounded of raw inputs (…, in) float32 or float64, of a transform of one bin."""
        return self.quantizer_input(x, self.hidden(x))

    def hidden(self, x: torch.Tensor) -> torch.Tensor | None:
        """Compute h, (…, rank) in the dtype of x; None without a branch."""
        return None if self.down is None else exact_linear(x, self.down.to(x.dtype))

    def quantizer_input(self, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """Compute z from h as well, which kernels round: the input smoothed, rotated, deflated, centred.

        Args:
            x: (…, in) float32 or float64.
            hidden: (…, rank) in the same dtype; None without a branch.

        Returns:
            (…, in), same dtype.
        """
        z = x if self.smoothing_factor is None else x / self.smoothing_factor.to(x.dtype)
        z = self.rotate(z)
        if self.deflation is not None and hidden is not None:
            z = z - exact_linear(hidden, self.deflation.to(x.dtype))
        return z if self.input_offset is None else z - self.input_offset.to(x.dtype)

    def of_means(self, means: torch.Tensor) -> torch.Tensor:
        """Compute z of means (num_bins, in) float32, each in its timestep bin; of (in,) for one of all bins."""
        by_bin = [self.at_bin(number)(mean) for number, mean in enumerate(means.reshape(-1, means.shape[-1]))]
        return torch.stack(by_bin).reshape(means.shape)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate (…, in) in blocks, where the input is."""
        return rotate(x) if self.rotated else x

    def smoothed(self, weight: torch.Tensor) -> torch.Tensor:
        """Multiply a weight (out, in) by what its input is divided by: float32."""
        weight = weight.detach().float()
        return weight if self.smoothing_factor is None else weight * self.smoothing_factor.float()
