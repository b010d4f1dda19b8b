"""Calibration of linears that read one input: they watch it in up to three phases.

    range        range, means, covariance of the input   →  smoothing factor, offsets, deflation
                 evenly spaced tokens of each bin        →  kept for the clip search
    regression   regression on the branch in each bin    →  deflation by bin
    hessian      mean of xᵀx of the quantized input      →  codes (GPTQ)

Clip ratios follow at the end, from the kept tokens and the rounded weights. A recipe that does not
need a phase skips it. Most recipes calibrate each linear on its own; one that shares smoothing
calibrates q, k and v together.
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from tempoquant.calibrate.bin_regressions import BinRegressions
from tempoquant.calibrate.corrected_bias import corrected_bias
from tempoquant.calibrate.input_moments import InputMoments
from tempoquant.calibrate.input_smoothing import hardly_seen, smoothing_of
from tempoquant.calibrate.named_layer import NamedLayer
from tempoquant.calibrate.phases import Phase
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
from tempoquant.input_transform import InputTransform
from tempoquant.layer import HardlySeen, LowRankBranch, QuantizedLayer
from tempoquant.methods import (
    Deflation,
    Feedback,
    HessianAccumulator,
    act_order,
    best_clip_ratio,
    clip_errors,
    deflation_of,
    feedback_matrix,
    gptq,
    round_to_nearest,
    split_weight,
    svdquant,
)  # fmt: skip
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins

_logger = logging.getLogger(__name__)


class _Rounded(NamedTuple):
    """One linear, complete except for its clip ratios."""

    codes: torch.Tensor
    scale: WeightScale
    branch: LowRankBranch | None
    bias_correction: torch.Tensor | None


class InputCalibration:
    """Quantizes linears that read the same input.

    Args:
        linears: by name; weights (out, in) of any float dtype, all of one `in`.
        format: of weights and activations.
        recipe: the settings.
        bins: timestep bins of the linears' denoiser.
        calls_per_bin: how many calls of each bin will be observed; the clip search's tokens are
            spread over them.
        chunks: how many tokens are processed at once.
        rank: of each linear's branch; None for the recipe's.
        weights_alone: whether the input is not rounded.

    Raises ModelError for NaN or Inf, RecipeError for a group size or a rank that does not fit.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], format: Format, recipe: Recipe, bins: TimestepBins,
        calls_per_bin: Sequence[int], chunks: TokenChunks | None = None, rank: int | None = None,
        weights_alone: bool = False,
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
        self._rank, self._weights_alone = recipe.rank if rank is None else rank, weights_alone
        self._deflates = recipe.deflation and self._rank > 0
        self._by_bin = recipe.centring and recipe.centring_by_bin and bins.num_bins > 1
        self._moments = InputMoments(
            first.shape[1], first.device, recipe.centring, self._deflates, bins.num_bins, self._by_bin,
            recipe.prior_fraction,
        )  # fmt: skip
        self._kept: list[list[torch.Tensor]] = [[] for _ in range(bins.num_bins)]
        self._transform = InputTransform(rotated=recipe.rotation)
        self._regressions: BinRegressions | None = None
        self._hardly_seen: HardlySeen | None = None
        self._hessian = HessianAccumulator(first.shape[1], first.device) if recipe.gptq else None

    def observe(self, phase: Phase, x: torch.Tensor, timestep_bin: int, *, in_statistics: bool = True) -> None:
        """Add the raw inputs of one call: (…, in). Raises CalibrationError, naming the layer, for
        NaN or Inf.

        Args:
            in_statistics: whether ranges and Hessians see the call; the clip search sees every one.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        if phase is Phase.RANGE:
            self._chunks.each(x, lambda rows: self._gather_range(rows, timestep_bin, in_statistics))
            self._keep_tokens(x, timestep_bin)
        elif in_statistics and phase is Phase.REGRESSION and self._regressions is not None:
            self._chunks.each(x, functools.partial(self._regressions.add, timestep_bin=timestep_bin))
        elif in_statistics and phase is Phase.HESSIAN:
            self._chunks.each(x, lambda rows: self._gather_hessian(rows, timestep_bin))

    def end_phase(self, phase: Phase) -> None:
        """End a phase, and compute the values that the next one needs."""
        if phase is Phase.REGRESSION and self._regressions is not None:
            deflation = self._regressions.deflation(self._moments, self._recipe.rotation)
            self._regressions = None
            self._deflate(deflation)
            self._fit_offset()
        if phase is not Phase.RANGE:
            return
        self._fit_smoothing()
        if self._deflates:
            factor = self._transform.smoothing_factor
            weights = [self._transform.smoothed(linear.weight) for linear in self._linears.values()]
            covariance = self._moments.take_covariance(factor)
            deflation = deflation_of(covariance, weights, factor, self._rank, self._recipe.rotation)
            self._deflate(deflation)
            if self._recipe.deflation_by_bin and self._bins.num_bins > 1:
                self._regressions = BinRegressions(deflation, factor, self._moments.means)
        self._fit_offset()

    def _fit_smoothing(self) -> None:
        weights = [linear.weight.detach() for linear in self._linears.values()]
        factor = smoothing_of(self._moments, weights, self._recipe, self._format)
        self._transform = self._transform._replace(smoothing_factor=factor)
        self._hardly_seen = hardly_seen(self._moments, weights, self._recipe)

    def _deflate(self, deflation: Deflation | None) -> None:
        down, taken_out = (None, None) if deflation is None else deflation
        self._transform = self._transform._replace(down=down, deflation=taken_out)

    def _fit_offset(self) -> None:
        """Fit the input offset, after everything else that is subtracted from the input."""
        if self._recipe.centring:
            offset = self._transform._replace(input_offset=None).of_means(self._means).to(torch.bfloat16)
            self._transform = self._transform._replace(input_offset=offset)

    @property
    def _means(self) -> torch.Tensor:
        """Return the input's mean, (in,) float32, or one for each timestep bin, (num_bins, in)."""
        return self._moments.means if self._by_bin else self._moments.means[0]

    def finish(self, watch: Stopwatch | None = None) -> list[NamedLayer]:
        """Return the linears in four bits; the calibration is used up.

        Raises HessianError, naming the linears, if their Hessian is not positive definite.
        """
        watch = watch or Stopwatch()
        with watch("smoothing, branch, rounding"):
            hessian = None if self._hessian is None else self._hessian.take()
            self._hessian = None  # the largest tensor of this object
            if hessian is not None:
                self._moments.add_prior_(hessian, self._transform.smoothing_factor, self._recipe.rotation)
            diagonal = None if hessian is None else hessian.diagonal().clone()
            feedback = None if hessian is None else self._feedback(hessian)
            del hessian
            rounded = {name: self._round(linear, feedback, diagonal) for name, linear in self._linears.items()}
            needed_float64 = feedback is not None and feedback.needed_float64
            feedback = None
        with watch("clip search"):
            clip_ratio = self._search_clip_ratio(list(rounded.values()))
        return [NamedLayer(name, self._layer(self._linears[name].bias, result, clip_ratio), needed_float64,
                           result.bias_correction, self._hardly_seen)
                for name, result in rounded.items()]  # fmt: skip

    def _keep_tokens(self, x: torch.Tensor, timestep_bin: int) -> None:
        """Keep this call's share of the tokens that the clip search reads in a bin, evenly
        spaced.
        """
        if not self._recipe.clip_ratios:
            return
        share = math.ceil(self._recipe.clip_search_tokens_per_bin / self._calls_per_bin[timestep_bin])
        spaced = torch.linspace(0, x.shape[0] - 1, min(share, x.shape[0]), device=x.device).round().long()
        self._kept[timestep_bin].append(x[spaced])

    def _gather_range(self, x: torch.Tensor, timestep_bin: int, in_statistics: bool) -> None:
        extremes = torch.stack(torch.aminmax(x, dim=0)).float()
        if not bool(torch.isfinite(extremes).all()):
            raise CalibrationError(
                f"the input of {self.name} holds NaN or Inf (timestep bin {timestep_bin}): check that the 16-bit model "
                "itself runs without overflow in this dtype."
            )
        if in_statistics:
            self._moments.add(x, extremes, timestep_bin)

    def _gather_hessian(self, x: torch.Tensor, timestep_bin: int) -> None:
        # What may run out of memory comes before any change: the piece can be processed again.
        z = self._transform.at_bin(timestep_bin)(x.float())
        rounded = z if self._weights_alone else quantize_activation(z, self._format, self._rule)
        if self._hessian is not None:
            self._hessian.add(rounded)

    def _feedback(self, hessian: torch.Tensor) -> Feedback:
        try:
            order = act_order(hessian.diagonal()) if self._recipe.act_order else None
            feedback = feedback_matrix(hessian, self._recipe.damping_fraction, order)
        except HessianError as error:
            raise HessianError(f"{self.name}: {error}") from error
        if feedback.needed_float64:
            _logger.warning("the Hessian of %s is positive definite in float64 only; it was factored there", self.name)
        return feedback

    def _round(self, linear: nn.Linear, feedback: Feedback | None, diagonal: torch.Tensor | None) -> _Rounded:
        branch, residual = self._split(linear)
        scale = weight_scale(residual, self._format, ScaleRule(self._recipe.weight_scale_rule), diagonal)
        if feedback is None:
            codes = round_to_nearest(residual, scale, self._format)
        else:
            codes = gptq(residual, feedback, scale, self._format, self._recipe.block_size)
        is_centred = self._transform.input_offset is not None
        bias_correction = self._bias_correction(linear, branch, residual) if is_centred else None
        return _Rounded(codes, scale, branch, bias_correction)

    def _bias_correction(self, linear: nn.Linear, branch: LowRankBranch | None, residual: torch.Tensor) -> torch.Tensor:
        """Compute the correction of the bias for the mean input, before the residual is rounded:
        (out,) or (num_bins, out) float32.
        """
        mean = self._means
        missing = mean @ linear.weight.detach().float().T - self._transform.of_means(mean) @ residual.T
        if branch is None:
            return missing
        hidden = mean @ branch.down.float().T
        return missing - (branch.up.float() @ hidden.unsqueeze(-1)).squeeze(-1)

    def _split(self, linear: nn.Linear) -> tuple[LowRankBranch | None, torch.Tensor]:
        """Return the branch, and the residual weight for four bits, rotated if the input is."""
        transform = self._transform
        factor, down, deflation = transform.smoothing_factor, transform.down, transform.deflation
        if down is None or deflation is None:
            branch, residual = svdquant(linear.weight.detach().float(), factor, self._rank)
            return branch, transform.rotate(residual)
        up, residual = split_weight(
            transform.smoothed(linear.weight), factor, Deflation(down, deflation), transform.rotated
        )
        return LowRankBranch(up, down, deflation), residual

    def _search_clip_ratio(self, rounded: Sequence[_Rounded]) -> torch.Tensor:
        """Search the clip ratio of each bin, (num_bins,) float32; linears with one input share the
        ratio with the least total error.
        """
        candidates = self._recipe.clip_candidates()
        if not candidates:
            return torch.ones(self._bins.num_bins)
        errors = torch.zeros(self._bins.num_bins, len(candidates), dtype=torch.float64)
        for result in rounded:
            residual = from_codes(result.codes, result.scale.effective, self._format)
            for timestep_bin, kept in enumerate(self._kept):
                tokens = self._transform.at_bin(timestep_bin)(torch.cat(kept).float())
                errors[timestep_bin] += clip_errors(tokens, residual, self._format, self._rule, candidates)
        return best_clip_ratio(errors, candidates)

    def _layer(self, bias: torch.Tensor | None, rounded: _Rounded, clip_ratio: torch.Tensor) -> QuantizedLayer:
        return QuantizedLayer(
            format=self._format,
            activation_scale_rule=self._rule,
            packed=pack(rounded.codes, self._format),
            scale=scale_to_bytes(rounded.scale.group, self._format),
            tensor_scale=rounded.scale.tensor if self._format.has_tensor_scale else None,
            smoothing_factor=self._transform.smoothing_factor,
            branch=rounded.branch,
            bias=corrected_bias(None if bias is None else bias.detach(), rounded.bias_correction),
            clip_ratio=clip_ratio,
            bins=self._bins,
            input_offset=self._transform.input_offset,
            rotated=self._transform.rotated,
            weights_alone=self._weights_alone,
        )
