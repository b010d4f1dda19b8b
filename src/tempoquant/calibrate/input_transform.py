"""InputTransform: what is done to an input before it is rounded, as it is settled step by step."""

from dataclasses import dataclass

import torch

from tempoquant.formats import rotate
from tempoquant.methods import Deflation


@dataclass(frozen=True)
class InputTransform:
    """What a layer does to its input before four bits, as `kernels.reference.quantizer_input` has it.

    Attributes:
        rotated: whether the smoothed input is rotated in blocks.
        smoothing_factor: (in,) bfloat16, or None.
        deflation: what the branch takes out of the input, or None.
        input_offset: (in,) bfloat16, or (num_bins, in), one for each timestep bin; None for none.
    """

    rotated: bool = False
    smoothing_factor: torch.Tensor | None = None
    deflation: Deflation | None = None
    input_offset: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, timestep_bin: int = 0) -> torch.Tensor:
        """Compute what is rounded of raw inputs (…, in) float32 of one timestep bin."""
        x = self.uncentred(x, timestep_bin)
        if self.input_offset is None:
            return x
        offset = self.input_offset if self.input_offset.dim() == 1 else self.input_offset[timestep_bin]
        return x - offset.float()

    def of_means(self, means: torch.Tensor) -> torch.Tensor:
        """Compute the same of means (num_bins, in) float32, each in its timestep bin; (in,) for one of all bins."""
        by_bin = [self(mean, number) for number, mean in enumerate(means.reshape(-1, means.shape[-1]))]
        return torch.stack(by_bin).reshape(means.shape)

    def uncentred(self, x: torch.Tensor, timestep_bin: int = 0) -> torch.Tensor:
        """Compute the same without the offset: (…, in) float32."""
        smoothed = self.rotate(x if self.smoothing_factor is None else x / self.smoothing_factor.float())
        if self.deflation is None:
            return smoothed
        down, deflation = self.deflation
        deflation = deflation if deflation.dim() == 2 else deflation[timestep_bin]
        return smoothed - x @ down.float().T @ deflation.float().T

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate (…, in) in blocks, where the input is."""
        return rotate(x) if self.rotated else x

    def smoothed(self, weight: torch.Tensor) -> torch.Tensor:
        """Multiply a weight (out, in) by what its input is divided by: float32."""
        weight = weight.detach().float()
        return weight if self.smoothing_factor is None else weight * self.smoothing_factor.float()
