"""The target's computation in plain PyTorch: an exported layer with the kernels' rounding,
measurable on a CPU.

The kernels differ visibly from our own 4-bit linear in one point: they choose codes by the scale
*before* it is rounded for storage, amax / top level, while products use the rounded one. In INT4
that is a bfloat16 and hardly matters; in NVFP4 it is an E4M3 number, up to 6 % away. Two things are
not imitated: the order of sums, and the reciprocal that is off by an ulp. Source: nunchaku's
src/kernels/zgemm/gemm_w4a4.cuh, quantize_w4a4_from_fpsum_warp and
quantize_w4a4_fp4_from_fpsum_warp.
"""

import torch
from torch.nn import functional

from tempoquant.errors import UnsupportedError
from tempoquant.formats import Format, group_amax, nearest_level
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.reference import WeightTensors, dequantize_residual
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.runtime.straight_through import straight_through

E4M3_MAX = 448.0


def quantize_activation(x: torch.Tensor, format: Format) -> torch.Tensor:
    """Round smoothed activations to four bits and back, as the kernels do.

    Args:
        x: (…, in) float32.

    Returns:
        (…, in) float32: level times rounded scale. A group whose rounded scale is 0 is 0; NaN stays
        NaN.
    """
    # The kernels multiply by the float32 that is nearest to 1 / top level.
    wanted = group_amax(x, format) * torch.tensor(1 / format.top_level, dtype=torch.float32)
    if format.scale_grid.is_e4m3:
        wanted = wanted.clamp(max=E4M3_MAX)
        scale = wanted.to(torch.float8_e4m3fn).float()
    else:
        scale = wanted.to(torch.bfloat16).float()
    scaled = x.unflatten(-1, (-1, format.group_size)) / wanted.unsqueeze(-1)
    scaled = torch.where(wanted.unsqueeze(-1) == 0, torch.zeros_like(scaled), scaled)
    return nearest_level(scaled, format).mul_(scale.unsqueeze(-1)).flatten(-2)


def nunchaku_linear(x: torch.Tensor, transform: InputTransform, weight: WeightTensors, format: Format) -> torch.Tensor:
    """Compute the 4-bit linear of the kernels.

    Args:
        x: (…, in). In bfloat16 the smoothed input and the branch's middle are bfloat16, as in the
            kernels; in float32 nothing but the four bits is rounded.
        transform, weight: of an exported layer: smoothed, with a branch, neither deflated nor
            centred.

    Returns:
        (…, out) in the dtype of x.
    """
    assert transform.smoothing_factor is not None and transform.down is not None and weight.up is not None
    raw = x.float()
    smoothed = (raw / transform.smoothing_factor.float()).to(x.dtype).float()
    bias = None if weight.bias is None else weight.bias.float()
    y = functional.linear(quantize_activation(smoothed, format), dequantize_residual(weight, format), bias)
    hidden = functional.linear(raw, transform.down.float()).to(x.dtype).float()
    return (y + functional.linear(hidden, weight.up.float())).to(x.dtype)


class NunchakuLinear(QuantizedLinear):
    """A QuantizedLinear with the target's computation: no clip ratio, the kernels' rounding of
    activations.
    """

    @straight_through
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (batch, …, in) to (batch, …, out), in the dtype of x. Raises UnsupportedError for
        activations of 8 bits.
        """
        if self.clock.eight_bit_timesteps is not None:
            raise UnsupportedError("an exported layer has 4-bit activations only: leave activation bits as they are.")
        with torch.autocast(x.device.type, enabled=False):
            return nunchaku_linear(x, self.input_transform(), self.weight_tensors(), self.entry.format)
