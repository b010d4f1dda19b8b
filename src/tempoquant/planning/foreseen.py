"""The predicted content of a checkpoint for a linear: exact except for file headers."""

import math
from typing import NamedTuple

import torch

from tempoquant.calibrate.denoiser_model import for_weights_alone
from tempoquant.checkpoint.schema import LayerEntry
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.formats import Format, ScaleRule
from tempoquant.recipe import Recipe

HEADER_BYTES = 128  # of one tensor in a safetensors file


class Linear(NamedTuple):
    """One linear of a block that gets four bits, or whose weight alone does."""

    format: Format
    out_features: int
    in_features: int
    num_input_tokens: int
    rank: int
    weights_alone: bool = False


def foreseen_entry(recipe: Recipe, linear: Linear, bias_dtype: str | None, num_bins: int) -> LayerEntry:
    """Predict a linear's entry in the checkpoint.

    Args:
        bias_dtype: of its 16-bit bias, None for no bias.
    """
    recipe = recipe.suited_to(linear.in_features, linear.out_features, num_bins)
    if linear.weights_alone:
        recipe = for_weights_alone(recipe)
    deflated, has_bins = recipe.deflation and linear.rank > 0, num_bins > 1
    by_bin = recipe.centring and recipe.centring_by_bin and has_bins
    changed = "float16" if by_bin else "float32"  # as `corrected_bias` makes it
    return LayerEntry(
        linear.format,
        ScaleRule(recipe.activation_scale_rule),
        linear.in_features,
        linear.out_features,
        linear.rank,
        recipe.smoothing_alpha is not None,
        changed if recipe.centring else bias_dtype,
        deflated,
        recipe.centring,
        recipe.rotation,
        centred_by_bin=by_bin,
        deflated_by_bin=deflated and recipe.deflation_by_bin and has_bins,
        weights_alone=linear.weights_alone,
    )


def num_bytes(form: StoredAs) -> int:
    """Return the bytes of a tensor of this form."""
    return math.prod(form.shape) * torch.empty((), dtype=form.dtype).element_size()
