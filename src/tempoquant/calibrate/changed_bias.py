"""The bias of a centred layer: the linear's own, and what centring adds to it."""

import torch


def changed_bias(bias: torch.Tensor | None, change: torch.Tensor | None) -> torch.Tensor | None:
    """A bias with what centring adds to it, then in float32; as it is without.

    One for each timestep bin, (num_bins, out), is in float16, as long as that holds it: there are several of them.
    """
    if change is None:
        return bias
    changed = change if bias is None else bias.float() + change
    if changed.dim() == 1:
        return changed
    narrow = changed.to(torch.float16)
    return narrow if bool(torch.isfinite(narrow).all()) else changed
