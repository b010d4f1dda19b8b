"""QuantizedLayer and LowRankBranch: the values that methods make, checkpoints store and the runtime runs."""

from dataclasses import dataclass, field

import torch

from tempoquant.errors import CheckpointError
from tempoquant.formats import Format, ScaleRule
from tempoquant.kernels.reference import LinearTensors, dequantize_residual, effective_weight
from tempoquant.timesteps import TimestepBins


@dataclass(frozen=True)
class HardlySeen:
    """Input features of a layer that were all but silent in calibration.

    Attributes:
        num_features: how many.
        amplification: how many times as large as elsewhere smoothing makes an ordinary value in one of them.
    """

    num_features: int
    amplification: float


@dataclass(frozen=True)
class LowRankBranch:
    """The 16-bit path beside the 4-bit product, y += (x · downᵀ) · upᵀ, reading the *raw* x.

    Attributes:
        up: (out, rank) bfloat16.
        down: (rank, in) bfloat16; already holds 1 / smoothing_factor.
        deflation: (in, rank) bfloat16, or None: (x · downᵀ) · deflationᵀ is taken off the smoothed, rotated input
            before it is quantized.
    """

    up: torch.Tensor
    down: torch.Tensor
    deflation: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.up.shape[1] != self.down.shape[0]:
            raise CheckpointError(f"branch ranks differ: up {tuple(self.up.shape)}, down {tuple(self.down.shape)}.")
        if self.deflation is not None and self.deflation.shape != self.down.T.shape:
            raise CheckpointError(
                f"deflation is {tuple(self.deflation.shape)}, not down's {tuple(self.down.shape)} turned."
            )

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def product(self) -> torch.Tensor:
        """up · down, (out, in) float32."""
        return self.up.float() @ self.down.float()


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One linear in four bits. `runtime.linear.QuantizedLinear` runs it.

    Attributes:
        format: of weight and activations.
        activation_scale_rule: for E8M0 activation scales.
        packed: (out, in / 2) uint8, two codes a byte.
        scale: (out, groups · bytes per scale) uint8, in storage form.
        tensor_scale: () float32, formats with a tensor scale only.
        smoothing_factor: (in,) bfloat16, or None.
        branch: the low-rank branch, or None.
        input_offset: (in,) bfloat16, taken off the smoothed, rotated, deflated input before it is quantized; None for
            nothing.
        bias: (out,), or None; with an input_offset it holds what the offset took away.
        clip_ratio: (num_bins,) float32.
        bins: the timestep bins that clip_ratio belongs to.
        rotated: whether the smoothed input and the residual weight are rotated in blocks (`formats.rotation`).
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

    def __post_init__(self) -> None:
        if self.clip_ratio.shape != (self.bins.num_bins,):
            raise CheckpointError(f"{self.bins.num_bins} bins need as many clip ratios, not {self.clip_ratio.numel()}.")
        if self.input_offset is not None and self.bias is None:
            raise CheckpointError("an input offset needs a bias that gives back what it takes away.")

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
    def tensors(self) -> LinearTensors:
        """What the kernels read."""
        branch = self.branch
        up, down, deflation = (None,) * 3 if branch is None else (branch.up, branch.down, branch.deflation)
        return LinearTensors(
            self.packed, self.scale, self.tensor_scale, self.smoothing_factor, up, down, deflation, self.input_offset,
            self.bias, self.rotated,
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that replaces the 16-bit weight (so not the bias, which was there before)."""
        stored = [*self.tensors._replace(bias=None), self.clip_ratio]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored if isinstance(tensor, torch.Tensor))

    @property
    def bits_per_weight(self) -> float:
        """Codes, scales, smoothing, branch, offset and clip ratios, over the number of weights."""
        return 8 * self.num_bytes / (self.out_features * self.in_features)

    def dequantize(self) -> torch.Tensor:
        """The effective weight, branch and smoothing included: (out, in) float32."""
        return effective_weight(self.tensors, self.format)

    def effective_bias(self) -> torch.Tensor | None:
        """(out,) float32: what the layer adds to `x · dequantize()ᵀ`; None for nothing."""
        if self.bias is None or self.input_offset is None:
            return None if self.bias is None else self.bias.float()
        return self.bias.float() - dequantize_residual(self.tensors, self.format) @ self.input_offset.float()
