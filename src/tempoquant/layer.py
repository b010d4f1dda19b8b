"""QuantizedLayer and LowRankBranch: the values that methods make, checkpoints store and the runtime
runs.
"""

from dataclasses import dataclass, field, replace

import torch

from tempoquant.errors import CheckpointError
from tempoquant.formats import Format, ScaleRule
from tempoquant.input_transform import InputTransform
from tempoquant.kernels.reference import WeightTensors, dequantize_residual, effective_weight
from tempoquant.timesteps import TimestepBins


@dataclass(frozen=True)
class HardlySeen:
    """Input features of a layer that were almost silent in calibration.

    Attributes:
        num_features: how many.
        amplification: how many times as large as in other features smoothing makes an ordinary
            value in one of them.
    """

    num_features: int
    amplification: float


@dataclass(frozen=True)
class LowRankBranch:
    """The 16-bit path beside the 4-bit product, y += (x · downᵀ) · upᵀ, reading the *raw* x.

    Attributes:
        up: (out, rank) bfloat16, or (num_bins, out, rank) with a deflation by timestep bin.
        down: (rank, in) bfloat16; already holds 1 / smoothing_factor.
        deflation: (in, rank) or (num_bins, in, rank) bfloat16, or None: (x · downᵀ) · deflationᵀ is
            subtracted from the smoothed, rotated input before it is quantized.
    """

    up: torch.Tensor
    down: torch.Tensor
    deflation: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.up.shape[-1] != self.down.shape[0]:
            raise CheckpointError(f"branch ranks differ: up {tuple(self.up.shape)}, down {tuple(self.down.shape)}.")
        if self.deflation is not None and self.deflation.shape[-2:] != self.down.T.shape:
            raise CheckpointError(
                f"deflation is {tuple(self.deflation.shape)}, not down's {tuple(self.down.shape)} turned."
            )
        if self.up.shape[:-2] != (() if self.deflation is None else self.deflation.shape[:-2]):
            raise CheckpointError("a branch's up and deflation are by timestep bin together, or neither is.")

    @property
    def rank(self) -> int:
        return self.up.shape[-1]

    @property
    def is_by_bin(self) -> bool:
        """Return whether up and deflation differ by timestep bin."""
        return self.up.dim() == 3

    def at_bin(self, timestep_bin: int) -> "LowRankBranch":
        """Return the branch of one bin; it shares memory."""
        if not self.is_by_bin or self.deflation is None:
            return self
        return LowRankBranch(self.up[timestep_bin], self.down, self.deflation[timestep_bin])

    def product(self) -> torch.Tensor:
        """Return up · down, (out, in) float32; by bin, (num_bins, out, in)."""
        return self.up.float() @ self.down.float()


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One linear in four bits. `runtime.linear.QuantizedLinear` runs it.

    Three things may differ by timestep bin: clip_ratio, the centring (input_offset with bias) and
    the deflation (branch.deflation with branch.up). A deflation by bin needs an offset by bin, if
    there is an offset: the mean that deflation leaves depends on the bin.

    Attributes:
        format: of weight and activations.
        activation_scale_rule: for E8M0 activation scales.
        packed: (out, in / 2) uint8, two codes a byte.
        scale: (out, groups · bytes per scale) uint8, in storage form.
        tensor_scale: () float32, formats with a tensor scale only.
        smoothing_factor: (in,) bfloat16, or None.
        branch: the low-rank branch, or None.
        input_offset: (in,) or (num_bins, in) bfloat16, subtracted from the smoothed, rotated,
            deflated input before it is quantized; None for none.
        bias: (out,), or None. With an input_offset it also holds the offset's product with the
            weight, and is (num_bins, out) if the offset is by bin.
        clip_ratio: (num_bins,) float32.
        bins: the timestep bins of clip_ratio.
        rotated: whether the smoothed input and the residual weight are rotated in blocks
            (`formats.rotation`).
        weights_alone: whether the input is not rounded: a layer that reads one timestep in place of
            tokens.
    """

    format: Format
    activation_scale_rule: ScaleRule
    packed: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor | None
    smoothing_factor: torch.Tensor | None
    branch: LowRankBranch | None
    bias: torch.Tensor | None
    clip_ratio: torch.Tensor
    bins: TimestepBins = field(default_factory=TimestepBins)
    input_offset: torch.Tensor | None = None
    rotated: bool = False
    weights_alone: bool = False

    def __post_init__(self) -> None:
        if self.clip_ratio.shape != (self.bins.num_bins,):
            raise CheckpointError(f"{self.bins.num_bins} bins need as many clip ratios, not {self.clip_ratio.numel()}.")
        if self.input_offset is not None and self.bias is None:
            raise CheckpointError("an input offset needs a bias that adds its product back.")
        if self.bias is not None and (self.bias.dim() == 2) != self.is_centred_by_bin:
            raise CheckpointError("input offset and bias are by timestep bin together, or neither is.")
        if self.is_deflated_by_bin and self.input_offset is not None and not self.is_centred_by_bin:
            raise CheckpointError("a deflation by timestep bin needs an input offset by timestep bin.")
        for name, tensor in self._by_bin().items():
            if tensor.shape[0] != self.bins.num_bins:
                raise CheckpointError(f"{name} by timestep bin is of {tensor.shape[0]} bins, not {self.bins.num_bins}.")

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 2

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def rank(self) -> int:
        return self.branch.rank if self.branch is not None else 0

    @property
    def is_centred_by_bin(self) -> bool:
        """Return whether input_offset and bias differ by timestep bin."""
        return self.input_offset is not None and self.input_offset.dim() == 2

    @property
    def is_deflated_by_bin(self) -> bool:
        """Return whether the branch's up and deflation differ by timestep bin."""
        return self.branch is not None and self.branch.is_by_bin

    def at_bin(self, timestep_bin: int) -> "QuantizedLayer":
        """Return the layer of one timestep bin, a layer with a single bin; it shares memory."""
        offset, bias = self.input_offset, self.bias
        if offset is not None and bias is not None and self.is_centred_by_bin:
            offset, bias = offset[timestep_bin], bias[timestep_bin]
        branch = None if self.branch is None else self.branch.at_bin(timestep_bin)
        clip_ratio = self.clip_ratio[timestep_bin].reshape(1)
        return replace(self, clip_ratio=clip_ratio, bins=TimestepBins(), branch=branch, input_offset=offset, bias=bias)

    @property
    def input_transform(self) -> InputTransform:
        """Return the transform of the inputs before they are rounded, in every timestep bin."""
        down, deflation = (None, None) if self.branch is None else (self.branch.down, self.branch.deflation)
        return InputTransform(self.smoothing_factor, self.rotated, down, deflation, self.input_offset)

    @property
    def weight_tensors(self) -> WeightTensors:
        """Return the weight that rounded inputs are multiplied with. Raises CheckpointError if it
        differs by timestep bin.
        """
        if by_bin := self._by_bin():
            raise CheckpointError(
                f"{' and '.join(by_bin)} of this layer differ by timestep bin: ask for those of one bin, at_bin(i)."
            )
        up = None if self.branch is None else self.branch.up
        return WeightTensors(self.packed, self.scale, self.tensor_scale, up, self.bias)

    @property
    def num_bytes(self) -> int:
        """Return the bytes that replace the 16-bit weight. A bias counts only by what it holds
        beyond the original bias, that is, with a bias by timestep bin, all rows but one.
        """
        stored = [self.packed, self.scale, self.tensor_scale, self.smoothing_factor, self.clip_ratio, self.input_offset]
        if self.branch is not None:
            stored += [self.branch.up, self.branch.down, self.branch.deflation]
        if self.bias is not None and self.is_centred_by_bin:
            stored.append(self.bias[1:])
        return sum(tensor.nbytes for tensor in stored if tensor is not None)

    @property
    def bits_per_weight(self) -> float:
        """Return `num_bytes` in bits, divided by the number of weights."""
        return 8 * self.num_bytes / (self.out_features * self.in_features)

    def dequantize(self, timestep_bin: int | None = None) -> torch.Tensor:
        """Return the effective weight, branch and smoothing included: (out, in) float32.

        Without a bin it is the mean over timestep bins. The bins differ only by the rounding error
        of the weights.
        """
        if timestep_bin is None and self.is_deflated_by_bin:
            return torch.stack([self.dequantize(each) for each in range(self.bins.num_bins)]).mean(0)
        layer = self.at_bin(timestep_bin or 0)
        return effective_weight(layer.input_transform, layer.weight_tensors, self.format)

    def effective_bias(self, timestep_bin: int | None = None) -> torch.Tensor | None:
        """Return what the layer adds to `x · dequantize()ᵀ`, (out,) float32; None for nothing.

        Without a bin it is the mean over timestep bins, as for the weight.
        """
        if timestep_bin is None and self.is_centred_by_bin:
            of_bins = [self.at_bin(each).effective_bias() for each in range(self.bins.num_bins)]
            return torch.stack([bias for bias in of_bins if bias is not None]).mean(0)
        layer = self.at_bin(timestep_bin or 0)
        if layer.bias is None or layer.input_offset is None:
            return None if layer.bias is None else layer.bias.float()
        return layer.bias.float() - dequantize_residual(layer.weight_tensors, self.format) @ layer.input_offset.float()

    def _by_bin(self) -> dict[str, torch.Tensor]:
        """Return the tensors that differ by timestep bin, all but the clip ratio."""
        by_bin = {"input_offset": self.input_offset, "bias": self.bias} if self.is_centred_by_bin else {}
        if self.branch is not None and self.branch.is_by_bin:
            by_bin |= {"up": self.branch.up, "deflation": self.branch.deflation}
        return {name: tensor for name, tensor in by_bin.items() if tensor is not None}
