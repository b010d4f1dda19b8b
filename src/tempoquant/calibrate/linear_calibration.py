"""Linears that read one input, on their way to four bits: they watch it in up to two phases.

    range     largest magnitude of each input feature  →  smoothing factor, branch, residual weight, scales
              evenly spaced tokens of each bin         →  kept for the clip search
    hessian   mean of xᵀx of the smoothed, quantized x →  codes (GPTQ)

Clip ratios follow at the end, from the tokens kept and the rounded weights. A recipe that does not need a phase skips
it. Most recipes give each linear an input calibration of its own; one that shares smoothing gives q, k and v one.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import nn

from tempoquant.calibrate.stopwatch import Stopwatch
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.errors import CalibrationError, HessianError, ModelError
from tempoquant.formats import (
    Format,
    ScaleRule,
    WeightScale,
    from_codes,
    pack,
    quantize_activation,
    scale_to_bytes,
    weight_scale,
)
from tempoquant.layer import LowRankBranch, QuantizedLayer
from tempoquant.methods import (
    Feedback,
    HessianAccumulator,
    best_clip_ratio,
    clip_errors,
    feedback_matrix,
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


def phases_of(recipe: Recipe) -> list[Phase]:
    """The phases a recipe needs, in order."""
    wanted = {Phase.RANGE: recipe.smoothing_alpha is not None or bool(recipe.clip_ratios), Phase.HESSIAN: recipe.gptq}
    return [phase for phase, needed in wanted.items() if needed]


class NamedLayer(NamedTuple):
    """name: in the expert. layer: what replaces it. needed_float64: its Hessian was too ill-conditioned for float32."""

    name: str
    layer: QuantizedLayer
    needed_float64: bool


class _Rounded(NamedTuple):
    """One linear, all but its clip ratios."""

    codes: torch.Tensor
    scale: WeightScale
    branch: LowRankBranch | None


class InputCalibration:
    """Quantizes linears that read the same input.

    Args:
        linears: by name; weights (out, in) of any float dtype, all of one `in`.
        format: of weights and activations.
        recipe: what to do.
        bins: timestep bins of the linears' expert.
        calls_per_bin: how many calls of each bin will be observed; the clip search's tokens are spread over them.
        chunks: how many tokens are worked on at once.

    Raises:
        ModelError: a weight holds NaN or Inf.
        RecipeError: the group size does not divide in_features, or the rank is too large.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], format: Format, recipe: Recipe, bins: TimestepBins,
        calls_per_bin: Sequence[int], chunks: TokenChunks | None = None,
    ) -> None:  # fmt: skip
        for name, linear in linears.items():
            format.num_groups(linear.in_features, name)
            for tensor, what in ((linear.weight, "weight"), (linear.bias, "bias")):
                if tensor is not None and not bool(torch.isfinite(tensor).all()):
                    raise ModelError(f"the {what} of {name} holds NaN or Inf: the model file is damaged.")
        first = next(iter(linears.values())).weight
        self.name = " and ".join(linears)
        self._linears = dict(linears)
        self._format, self._recipe, self._bins = format, recipe, bins
        self._calls_per_bin, self._chunks = calls_per_bin, chunks or TokenChunks()
        self._rule = ScaleRule(recipe.activation_scale_rule)
        self._amax = torch.zeros(first.shape[1], device=first.device)
        self._kept: list[list[torch.Tensor]] = [[] for _ in range(bins.num_bins)]
        self._factor: torch.Tensor | None = None
        self._hessian = HessianAccumulator(first.shape[1], first.device) if recipe.gptq else None

    def observe(self, phase: Phase, x: torch.Tensor, timestep_bin: int, *, in_statistics: bool = True) -> None:
        """Take in the raw inputs of one call: (…, in).

        Args:
            in_statistics: whether ranges and Hessians see the call; the clip search sees every one.

        Raises CalibrationError, naming the layer, for NaN or Inf.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        if phase is Phase.RANGE:
            self._chunks.each(x, lambda rows: self._gather_range(rows, timestep_bin, in_statistics))
            self._keep_tokens(x, timestep_bin)
        elif in_statistics:
            self._chunks.each(x, self._gather_hessian)

    def settle(self, phase: Phase) -> None:
        """End a phase: compute what the next one needs."""
        if phase is Phase.RANGE and self._recipe.smoothing_alpha is not None:
            weight_amax = torch.stack([linear.weight.abs().amax(0).float() for linear in self._linears.values()])
            self._factor = smoothing_factor(self._amax, weight_amax.amax(0), self._recipe.smoothing_alpha, self._format)

    def finish(self, watch: Stopwatch | None = None) -> list[NamedLayer]:
        """The linears in four bits; the calibration is used up.

        Raises HessianError, naming the linears, when their Hessian is not positive definite.
        """
        watch = watch or Stopwatch()
        with watch("smoothing, branch, rounding"):
            feedback = None if self._hessian is None else self._feedback(self._hessian)
            self._hessian = None  # the largest thing this object holds
            rounded = {name: self._round(linear, feedback) for name, linear in self._linears.items()}
            needed_float64 = feedback is not None and feedback.needed_float64
            feedback = None
        with watch("clip search"):
            clip_ratio = self._search_clip_ratio(list(rounded.values()))
        return [NamedLayer(name, self._layer(self._linears[name].bias, result, clip_ratio), needed_float64)
                for name, result in rounded.items()]  # fmt: skip

    def _keep_tokens(self, x: torch.Tensor, timestep_bin: int) -> None:
        """Keep this call's share of the tokens that the clip search reads in a bin, evenly spaced."""
        if not self._recipe.clip_ratios:
            return
        share = math.ceil(self._recipe.clip_search_tokens_per_bin / self._calls_per_bin[timestep_bin])
        spaced = torch.linspace(0, x.shape[0] - 1, min(share, x.shape[0]), device=x.device).round().long()
        self._kept[timestep_bin].append(x[spaced])

    def _gather_range(self, x: torch.Tensor, timestep_bin: int, in_statistics: bool) -> None:
        amax = x.abs().amax(0).float()
        if not bool(torch.isfinite(amax).all()):
            raise CalibrationError(
                f"the input of {self.name} holds NaN or Inf (timestep bin {timestep_bin}): check that the 16-bit model "
                "itself runs without overflow in this dtype."
            )
        if in_statistics:
            self._amax = torch.maximum(self._amax, amax)

    def _gather_hessian(self, x: torch.Tensor) -> None:
        # All that may run out of memory comes before anything changes, so that the piece can be taken in again.
        rounded = quantize_activation(self._smooth(x.float()), self._format, self._rule)
        if self._hessian is not None:
            self._hessian.add(rounded)

    def _smooth(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._factor is None else x / self._factor.float()

    def _feedback(self, hessian: HessianAccumulator) -> Feedback:
        try:
            feedback = feedback_matrix(hessian.take(), self._recipe.damping_fraction)
        except HessianError as error:
            raise HessianError(f"{self.name}: {error}") from error
        if feedback.needed_float64:
            _logger.warning("the Hessian of %s is positive definite in float64 only; it was factored there", self.name)
        return feedback

    def _round(self, linear: nn.Linear, feedback: Feedback | None) -> _Rounded:
        branch, residual = svdquant(linear.weight.detach().float(), self._factor, self._recipe.rank)
        scale = weight_scale(residual, self._format, ScaleRule(self._recipe.weight_scale_rule))
        if feedback is None:
            codes = round_to_nearest(residual, scale, self._format)
        else:
            codes = gptq(residual, feedback, scale, self._format, self._recipe.block_size)
        return _Rounded(codes, scale, branch)

    def _search_clip_ratio(self, rounded: Sequence[_Rounded]) -> torch.Tensor:
        """(num_bins,) float32. Linears that share an input share the ratio of the least error of all together."""
        candidates = self._recipe.clip_candidates()
        if not candidates:
            return torch.ones(self._bins.num_bins)
        errors = torch.zeros(self._bins.num_bins, len(candidates), dtype=torch.float64)
        for codes, scale, _ in rounded:
            residual = from_codes(codes, scale.effective, self._format)
            for timestep_bin, kept in enumerate(self._kept):
                smoothed = self._smooth(torch.cat(kept).float())
                errors[timestep_bin] += clip_errors(smoothed, residual, self._format, self._rule, candidates)
        return best_clip_ratio(errors, candidates)

    def _layer(self, bias: torch.Tensor | None, rounded: _Rounded, clip_ratio: torch.Tensor) -> QuantizedLayer:
        return QuantizedLayer(
            format=self._format,
            activation_scale_rule=self._rule,
            packed=pack(rounded.codes, self._format),
            scale=scale_to_bytes(rounded.scale.group, self._format),
            tensor_scale=rounded.scale.tensor if self._format.has_tensor_scale else None,
            smoothing_factor=self._factor,
            branch=rounded.branch,
            bias=None if bias is None else bias.detach(),
            clip_ratio=clip_ratio,
            bins=self._bins,
        )
