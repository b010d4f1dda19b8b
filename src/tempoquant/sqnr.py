"""The distance of one tensor from another, as a signal-to-quantization-noise ratio."""

import math

import torch

from tempoquant.errors import ModelError


def sqnr_db(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Compute 10·log₁₀(signal power / error power), in decibels; the error is `other − reference`.

    Laws: equal tensors give +inf. An error at 1/10 of the signal's amplitude gives 20 dB. Scaling
    both tensors by one number, or permuting both alike, changes nothing. Swapping them does change
    it: the reference is the signal. A reference of all zeros gives −inf, unless the tensors are
    equal.

    Args:
        reference: any shape and floating dtype; the powers are summed in float64.
        other: the same shape.

    Raises:
        ModelError: the shapes differ, or a value is NaN or infinite (an average over such numbers
            would hide them).
    """
    if reference.shape != other.shape:
        raise ModelError(f"tensors to compare differ in shape: {tuple(reference.shape)} and {tuple(other.shape)}.")
    signal = reference.detach().to("cpu", torch.float64)
    error = other.detach().to("cpu", torch.float64) - signal
    if not bool(torch.isfinite(error).all()):
        raise ModelError("a tensor to compare holds NaN or infinity: the model that made it is broken.")
    signal_power, error_power = float(signal.square().sum()), float(error.square().sum())
    if error_power == 0:
        return math.inf
    return 10 * math.log10(signal_power / error_power) if signal_power > 0 else -math.inf
