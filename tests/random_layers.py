"""Random tensors, and a random layer in four bits with everything that one may have."""

import dataclasses

import torch
from torch import nn

from tempoquant.formats import Format, ScaleRule, get_format, pack, scale_to_bytes, to_codes, weight_scale
from tempoquant.kernels.reference import w4a4_linear
from tempoquant.layer import LowRankBranch, QuantizedLayer
from tempoquant.timesteps import TimestepBins

BINS = TimestepBins((917.5, 958.25))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return normal numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_linear(in_features: int = 128, out_features: int = 64, seed: int = 0) -> nn.Linear:
    """Make a linear with a bias, all numbers normal."""
    linear = nn.Linear(in_features, out_features)
    linear.weight.data = random(out_features, in_features, seed=seed)
    linear.bias.data = random(out_features, seed=seed + 1)
    return linear.requires_grad_(False)


def random_layer(
    linear: nn.Linear,
    format: Format | str = "mxfp4",
    bins: TimestepBins = BINS,
    rank: int = 4,
    smoothed: bool = True,
    seed: int = 0,
    deflated: bool = True,
    centred: bool = True,
    centred_by_bin: bool = False,
    deflated_by_bin: bool = False,
    rotated: bool = False,
    rule: ScaleRule = ScaleRule.CEIL,
    size: float = 0.1,
) -> QuantizedLayer:
    """Round a linear to nearest, with a random branch, random smoothing, a random input offset, and
    clip ratios that differ by bin; with `…_by_bin` see `by_bin`. What is tested with it is
    arithmetic and storage, never quality.

    Args:
        rule: of the scales of activations.
        size: standard deviation of the branch's, the deflation's and the offset's numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    format = get_format(format) if isinstance(format, str) else format
    weight = linear.weight.detach().float()
    smoothing, branch = None, None
    if smoothed:
        smoothing = (torch.rand(linear.in_features, generator=generator) + 0.5).to(torch.bfloat16)
        weight = weight * smoothing.float()
    if rank:
        up = size * torch.randn(linear.out_features, rank, generator=generator)
        down = size * torch.randn(rank, linear.in_features, generator=generator)
        deflation = size * torch.randn(linear.in_features, rank, generator=generator)
        branch = LowRankBranch(
            up.to(torch.bfloat16), down.to(torch.bfloat16), deflation.to(torch.bfloat16) if deflated else None
        )
    offset = size * torch.randn(linear.in_features, generator=generator)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    if centred:  # as in a quantized model: there always is a bias then, in float32
        bias = torch.randn(linear.out_features, generator=generator) if bias is None else bias.float()
    scale = weight_scale(weight, format, ScaleRule.FLOOR)
    layer = QuantizedLayer(
        format=format,
        activation_scale_rule=rule,
        packed=pack(to_codes(weight, scale.effective, format), format),
        scale=scale_to_bytes(scale.group, format),
        tensor_scale=scale.tensor.clone() if format.has_tensor_scale else None,
        smoothing_factor=smoothing,
        branch=branch,
        bias=bias,
        clip_ratio=0.5 + torch.rand(bins.num_bins, generator=generator),
        bins=bins,
        input_offset=offset.to(torch.bfloat16) if centred else None,
        rotated=rotated,
    )
    if not (centred_by_bin or deflated_by_bin):
        return layer
    layer = by_bin(layer, centred_by_bin, deflated_by_bin, seed=seed)
    narrow = layer.bias.half() if centred_by_bin and layer.bias is not None else layer.bias  # as a recipe makes it
    return dataclasses.replace(layer, bias=narrow)


def by_bin(
    layer: QuantizedLayer, centred: bool = True, deflated: bool = True, spread: float = 1.0, seed: int = 0
) -> QuantizedLayer:
    """Make a layer with an offset, a bias, a deflation and an up for each of its bins: random
    around their own, as far as `spread` allows; 0 leaves all bins equal.
    """
    generator = torch.Generator().manual_seed(seed + 1000)

    def around(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(layer.bins.num_bins, *tensor.shape, generator=generator)
        return (tensor.float() + spread * tensor.float().std() * noise).to(tensor.dtype)

    offset, bias, branch = layer.input_offset, layer.bias, layer.branch
    if centred and offset is not None and bias is not None:
        offset, bias = around(offset), around(bias)
    if deflated and branch is not None and branch.deflation is not None:
        branch = LowRankBranch(around(branch.up), branch.down, around(branch.deflation))
    return dataclasses.replace(layer, input_offset=offset, bias=bias, branch=branch)


def reference_of(
    layer: QuantizedLayer, x: torch.Tensor, clip_ratio: torch.Tensor | float = 1.0, eight_bits: bool = False
) -> torch.Tensor:
    """Compute the reference's result for a layer whose tensors do not differ by bin."""
    transform, weight, rule = layer.input_transform, layer.weight_tensors, layer.activation_scale_rule
    return w4a4_linear(x, transform, weight, layer.format, rule, clip_ratio, eight_bits)
