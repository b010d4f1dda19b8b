"""quantize_linear: one layer, for notebooks, tests, and comparing methods."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from tempoquant.calibrate.linear_calibration import InputCalibration
from tempoquant.calibrate.phases import phases_of
from tempoquant.errors import CalibrationError
from tempoquant.recipe import Recipe
from tempoquant.runtime.linear import QuantizedLinear
from tempoquant.timesteps import NUM_TRAIN_TIMESTEPS, TimestepBins


def quantize_linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    calibration_inputs: torch.Tensor | Mapping[int, torch.Tensor] | None,
    recipe: str | Path | Recipe = "default",
) -> QuantizedLinear:
    """Quantize one linear layer: for notebooks, tests, and comparing methods.

    Args:
        weight: (out, in), any float dtype.
        bias: (out,) or None.
        calibration_inputs: raw inputs (tokens, in), or {timestep_bin: (tokens, in)} for bins 0 … n
            − 1, bin 0 the cleanest; then the layer's bins divide the timesteps 0 … 1000 into n
            equal intervals. None for a recipe that needs no calibration.
        recipe: as for `quantize`; its bin fractions, prompts and sampling settings are ignored.

    Returns:
        The layer, ready to be called: inside `layer.at_timestep(t)` when it has several bins.

    Raises:
        TempoQuantError: NaN or Inf, a group size that does not divide, a rank that is too large, a
            Hessian that is not positive definite, missing calibration inputs.
    """
    recipe = Recipe.load(recipe)
    by_bin = _inputs_by_bin(calibration_inputs, weight.shape[1], recipe)
    num_bins = max(1, len(by_bin))
    bins = TimestepBins(tuple(NUM_TRAIN_TIMESTEPS * i / num_bins for i in range(1, num_bins)))
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    calibration = InputCalibration({"the layer": linear}, recipe.default_format, recipe, bins, [1] * num_bins)
    with torch.no_grad():
        for phase in phases_of(recipe):
            for timestep_bin, inputs in by_bin.items():
                calibration.observe(phase, inputs.to(weight.device), timestep_bin)
            calibration.end_phase(phase)
        [named] = calibration.finish()
        return QuantizedLinear.from_layer(named.layer, compute_dtype=weight.dtype)


def _inputs_by_bin(
    inputs: torch.Tensor | Mapping[int, torch.Tensor] | None, in_features: int, recipe: Recipe
) -> dict[int, torch.Tensor]:
    if inputs is None:
        if recipe.needs_calibration:
            raise CalibrationError(f"recipe {recipe.name} looks at activations: give calibration_inputs.")
        return {}
    by_bin = dict(inputs) if isinstance(inputs, Mapping) else {0: inputs}
    if sorted(by_bin) != list(range(len(by_bin))) or not by_bin:
        raise CalibrationError(f"timestep bins are numbered 0, 1, … without gaps, not {sorted(by_bin)}.")
    for timestep_bin, tokens in by_bin.items():
        if tokens.shape[-1] != in_features or tokens.numel() == 0:
            raise CalibrationError(
                f"calibration inputs of bin {timestep_bin} have shape {tuple(tokens.shape)}; (tokens, {in_features}) "
                "with at least one token is wanted."
            )
    return by_bin
