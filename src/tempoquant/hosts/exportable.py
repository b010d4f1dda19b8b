"""What a layer may have that other people's runtimes of 4-bit layers know nothing of."""

from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.formats import ScaleRule


def unknown_elsewhere(entry: LayerEntry, target: str) -> str | None:
    """Return what a layer has and no other runtime takes, in words that name the setting; None for nothing such."""
    if entry.deflated_by_bin:
        return f"has a deflation for each timestep bin (deflation_by_bin = true), and {target} knows no timestep"
    if entry.centred_by_bin:
        return f"has an input offset for each timestep bin (centring_by_bin = true), and {target} knows no timestep"
    if entry.deflated:
        return f"has deflation (deflation = true), which {target} cannot hold"
    if entry.rotated:
        return f"has rotated features (rotation = true), which {target} cannot hold"
    if entry.centred:
        return f"has an input offset (centring = true), which {target} cannot hold"
    if entry.activation_scale_rule is ScaleRule.LEAST_ERROR:
        return f'has activation scales of least error (activation_scale_rule = "least_error"), and {target} none such'
    return None
