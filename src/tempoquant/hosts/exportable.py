"""The properties of a layer that other runtimes of 4-bit layers do not support."""

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.formats import ScaleRule


def unknown_elsewhere(entry: LayerEntry, target: str) -> str | None:
    """Return the property of a layer that no other runtime supports, in words that name the
    setting; None for none.
    """
    if entry.weights_alone:
        return f"has 4-bit weights and 16-bit inputs (modulation_format), which {target} cannot hold"
    if entry.deflated_by_bin:
        return f"has a deflation for each timestep bin (deflation_by_bin = true), and {target} has no timesteps"
    if entry.centred_by_bin:
        return f"has an input offset for each timestep bin (centring_by_bin = true), and {target} has no timesteps"
    if entry.deflated:
        return f"has deflation (deflation = true), which {target} cannot hold"
    if entry.rotated:
        return f"has rotated features (rotation = true), which {target} cannot hold"
    if entry.centred:
        return f"has an input offset (centring = true), which {target} cannot hold"
    if entry.activation_scale_rule is ScaleRule.LEAST_ERROR:
        return f'has activation scales of least error (activation_scale_rule = "least_error"), and {target} has none'
    return None
