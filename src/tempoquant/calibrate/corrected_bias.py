"""The bias of a centred layer: the linear's own bias plus the correction that centring adds."""

import torch


def corrected_bias(bias: torch.Tensor | None, correction: torch.Tensor | None) -> torch.Tensor | None:
    """Add centring's correction to a bias, in float32; without a correction, return the bias as it
    is.

    A bias for each timestep bin, (num_bins, out), is float16 if it fits, since there are several.
    """
    if correction is None:
        return bias
    corrected = correction if bias is None else bias.float() + correction
    if corrected.dim() == 1:
        return corrected
    narrow = corrected.to(torch.float16)
    return narrow if bool(torch.isfinite(narrow).all()) else corrected
