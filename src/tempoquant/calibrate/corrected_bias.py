"""The bias of a centred layer: the linear's own, and what centring adds to it."""

import torch


def corrected_bias(bias: torch.Tensor | None, correction: torch.Tensor | None) -> torch.Tensor | None:
    """Add to a bias what centring asks for, then in float32; without, return it as it is.

    One for each timestep bin, (num_bins, out), is in float16, as long as that holds it: there are several of them.
    """
    if correction is None:
        return bias
    corrected = correction if bias is None else bias.float() + correction
    if corrected.dim() == 1:
        return corrected
    narrow = corrected.to(torch.float16)
    return narrow if bool(torch.isfinite(narrow).all()) else corrected
