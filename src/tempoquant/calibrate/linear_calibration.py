"""One linear on its way to four bits: it watches its inputs in up to three phases, and each phase settles one thing.

    range     largest magnitude of each input feature  →  smoothing factor, branch, residual weight, scales
    hessian   mean of xᵀx of the smoothed, quantized x →  codes (GPTQ)
    clip      output error of the candidates, per bin  →  clip ratios

A recipe that does not need a phase skips it.
"""

import logging
from enum import Enum

import torch

from tempoquant.errors import CalibrationError, HessianError, ModelError
from tempoquant.formats import Format, ScaleRule, from_codes, pack, quantize_activation, scale_to_bytes, weight_scale
from tempoquant.layer import QuantizedLayer
from tempoquant.methods import (
    ClipSearch,
    Decomposition,
    HessianAccumulator,
    gptq,
    round_to_nearest,
    smoothing_factor,
    svdquant,
)
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins

_logger = logging.getLogger(__name__)


class Phase(Enum):
    """What the inputs are watched for."""

    RANGE = "range"
    HESSIAN = "hessian"
    CLIP = "clip"


def phases_of(recipe: Recipe) -> list[Phase]:
    """The phases a recipe needs, in order."""
    wanted = {
        Phase.RANGE: recipe.smoothing_alpha is not None,
        Phase.HESSIAN: recipe.gptq,
        Phase.CLIP: bool(recipe.clip_ratios),
    }
    return [phase for phase, needed in wanted.items() if needed]


class LinearCalibration:
    """Quantizes one linear.

    Args:
        name: of the layer, for errors.
        weight: (out, in), any float dtype.
        bias: (out,) or None; kept in its dtype.
        format: of weight and activations.
        recipe: what to do.
        bins: timestep bins of the layer's expert.

    Raises:
        ModelError: the weight holds NaN or Inf.
        RecipeError: the group size does not divide in_features, or the rank is too large.
    """

    def __init__(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, format: Format, recipe: Recipe,
        bins: TimestepBins,
    ) -> None:  # fmt: skip
        format.num_groups(weight.shape[1], name)
        for tensor, what in ((weight, "weight"), (bias, "bias")):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"the {what} of {name} holds NaN or Inf: the model file is damaged.")
        self.name = name
        self.needed_float64 = False
        self._weight, self._bias = weight.detach().float(), bias
        self._format, self._recipe, self._bins = format, recipe, bins
        self._rule = ScaleRule(recipe.activation_scale_rule)
        self._amax = torch.zeros(weight.shape[1], device=weight.device)
        self._factor: torch.Tensor | None = None
        self._hessian = HessianAccumulator(weight.shape[1], weight.device) if recipe.gptq else None
        self._clip_search: ClipSearch | None = None
        self._codes: torch.Tensor | None = None
        self._decomposition: Decomposition | None = None

    def observe(self, phase: Phase, x: torch.Tensor, timestep_bin: int) -> None:
        """Take in the raw inputs of one call: (…, in). Raises CalibrationError, naming the layer, for NaN or Inf."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        amax = x.abs().amax(0)
        if not bool(torch.isfinite(amax).all()):
            raise CalibrationError(
                f"the input of {self.name} holds NaN or Inf (timestep bin {timestep_bin}): check that the 16-bit model "
                "itself runs without overflow in this dtype."
            )
        if phase is Phase.RANGE:
            self._amax = torch.maximum(self._amax, amax)
        elif phase is Phase.HESSIAN and self._hessian is not None:
            self._hessian.add(quantize_activation(self._smooth(x), self._format, self._rule))
        elif phase is Phase.CLIP:
            self._require_codes()  # the search runs against the rounded weight
            if self._clip_search is not None:
                self._clip_search.add(self._smooth(x), timestep_bin)

    def settle(self, phase: Phase) -> None:
        """End a phase: compute what its observations decide."""
        if phase is Phase.RANGE:
            self._decompose()
        elif phase is Phase.HESSIAN:
            self._round()

    def finish(self) -> QuantizedLayer:
        """The layer in four bits. Phases that the recipe skips are settled without observations."""
        codes = self._require_codes()
        decomposition = self._require_decomposition()
        clip_ratio = torch.ones(self._bins.num_bins) if self._clip_search is None else self._clip_search.best()
        return QuantizedLayer(
            format=self._format,
            activation_scale_rule=self._rule,
            packed=pack(codes, self._format),
            scale=scale_to_bytes(self._scale.group, self._format),
            tensor_scale=self._scale.tensor if self._format.has_tensor_scale else None,
            smoothing_factor=self._factor,
            branch=decomposition.branch,
            bias=self._bias,
            clip_ratio=clip_ratio,
            bins=self._bins,
        )

    def _smooth(self, x: torch.Tensor) -> torch.Tensor:
        self._require_decomposition()
        return x if self._factor is None else x / self._factor.float()

    def _decompose(self) -> None:
        recipe = self._recipe
        if recipe.smoothing_alpha is not None:
            self._factor = smoothing_factor(self._amax, self._weight, recipe.smoothing_alpha, self._format)
        self._decomposition = svdquant(self._weight, self._factor, recipe.rank)
        residual = self._decomposition.residual_weight
        self._scale = weight_scale(residual, self._format, ScaleRule(recipe.weight_scale_rule))

    def _require_decomposition(self) -> Decomposition:
        if self._decomposition is None:
            self._decompose()
        assert self._decomposition is not None
        return self._decomposition

    def _round(self) -> None:
        residual = self._require_decomposition().residual_weight
        if self._hessian is None:
            self._codes = round_to_nearest(residual, self._scale, self._format)
        else:
            try:
                result = gptq(residual, self._hessian.hessian, self._scale, self._format,
                              self._recipe.damping_fraction, self._recipe.block_size)  # fmt: skip
            except HessianError as error:
                raise HessianError(f"{self.name}: {error}") from error
            self._codes, self.needed_float64 = result
            if self.needed_float64:
                _logger.warning(
                    "the Hessian of %s is positive definite in float64 only; it was factored there", self.name
                )
            self._hessian = None  # the largest thing this object holds
        if self._recipe.clip_ratios:
            self._clip_search = ClipSearch(
                from_codes(self._codes, self._scale.effective, self._format), self._format, self._rule,
                self._recipe.clip_candidates(), self._bins.num_bins, self._recipe.clip_search_max_tokens,
            )  # fmt: skip

    def _require_codes(self) -> torch.Tensor:
        if self._codes is None:
            self._round()
        assert self._codes is not None
        return self._codes
