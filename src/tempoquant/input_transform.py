"""InputTransform: the steps that a 4-bit linear applies to its input before it rounds it.

    h = x · downᵀ
    z = H(x / smoothing_factor) − h · deflationᵀ − input_offset

H is the block rotation (`formats.rotation`). A layer leaves out the steps that it does not have. It
rounds z to four bits, and passes h to the branch in 16. Calibration fits the transform step by
step, the layer stores it, and the kernels must reproduce it.
"""

from typing import NamedTuple

import torch

from tempoquant.exact_products import exact_linear
from tempoquant.formats import rotate


class InputTransform(NamedTuple):
    """The input transform that linears with a shared quantized input have in common.

    Attributes:
        smoothing_factor: (in,), or None.
        rotated: whether the smoothed input is rotated in blocks; deflation and input_offset then
            apply to the rotated features, as the weight does.
        down: (rank, in), or None without a branch; already holds 1 / smoothing_factor, and reads
            the raw input.
        deflation: (in, rank), or (num_bins, in, rank), one for each timestep bin; None for none.
        input_offset: (in,), or (num_bins, in), one for each timestep bin; None for none.
    """

    smoothing_factor: torch.Tensor | None = None
    rotated: bool = False
    down: torch.Tensor | None = None
    deflation: torch.Tensor | None = None
    input_offset: torch.Tensor | None = None

    def at_bin(self, timestep_bin: int) -> "InputTransform":
        """Return the transform of one timestep bin; it shares memory."""
        deflation, offset = self.deflation, self.input_offset
        if deflation is not None and deflation.dim() == 3:
            deflation = deflation[timestep_bin]
        if offset is not None and offset.dim() == 2:
            offset = offset[timestep_bin]
        return self._replace(deflation=deflation, input_offset=offset)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute z, the numbers to round, from raw inputs (…, in) float32 or float64. The
        transform has one bin.
        """
        return self.quantizer_input(x, self.hidden(x))

    def hidden(self, x: torch.Tensor) -> torch.Tensor | None:
        """Compute h, (…, rank) in the dtype of x; None without a branch."""
        return None if self.down is None else exact_linear(x, self.down.to(x.dtype))

    def quantizer_input(self, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """Compute the input of the quantizer, z, from x and h: smoothed, rotated, deflated,
        centred.

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
        """Compute z of the mean input of each timestep bin, (num_bins, in) float32; a mean (in,)
        holds for every bin.
        """
        by_bin = [self.at_bin(number)(mean) for number, mean in enumerate(means.reshape(-1, means.shape[-1]))]
        return torch.stack(by_bin).reshape(means.shape)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate (…, in) in blocks, if this transform rotates its input."""
        return rotate(x) if self.rotated else x

    def smoothed(self, weight: torch.Tensor) -> torch.Tensor:
        """Multiply a weight (out, in) by the factor that divides its input; the result is
        float32.
        """
        weight = weight.detach().float()
        return weight if self.smoothing_factor is None else weight * self.smoothing_factor.float()
