"""Trials of ranks: linears that read one input, rounded at several ranks, and the output error of
each.

Everything is as in `InputCalibration`, except for GPTQ and clip ratios: weights are rounded to
nearest. Both lower the errors of every rank, and a budget depends only on their proportions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tempoquant.calibrate.linear_calibration import InputCalibration
from tempoquant.calibrate.phases import Phase
from tempoquant.calibrate.token_chunks import TokenChunks
from tempoquant.formats import Format
from tempoquant.kernels.reference import w4a4_linear
from tempoquant.layer import LowRankBranch
from tempoquant.methods import deflation_along, leading_directions, split_with_factors, svdquant, truncated_svd
from tempoquant.recipe import Recipe
from tempoquant.timesteps import TimestepBins


class RankTrials(InputCalibration):
    """Watches an input in the range phase, then tries ranks.

    Args:
        linears: by name; weights (out, in) of any float dtype, all of one `in`.
        format: of weights and activations.
        recipe: the settings; its rank and GPTQ are ignored.
        ranks: to try, 0 for no branch; none above the smaller side of a weight.
        chunks: how many tokens are processed at once.

    Raises:
        ModelError, RecipeError: as InputCalibration.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        format: Format,
        recipe: Recipe,
        ranks: Sequence[int],
        chunks: TokenChunks | None = None,
    ) -> None:
        plain = recipe.replace(gptq=False, act_order=False, clip_ratios=())
        super().__init__(linears, format, plain, TimestepBins(), [1], chunks, max(ranks))
        self._ranks, self.names = ranks, tuple(linears)
        self._covariance = self._directions = torch.empty(0)
        self._factors: dict[nn.Linear, tuple[torch.Tensor, torch.Tensor]] = {}

    def end_phase(self, phase: Phase) -> None:
        """End a phase, and compute the values that all ranks share."""
        self._fit_smoothing()
        weights = {linear: self._transform.smoothed(linear.weight) for linear in self._linears.values()}
        most = max(self._ranks)
        if self._deflates:
            self._covariance = self._moments.take_covariance(self._transform.smoothing_factor)
            self._directions = leading_directions(self._covariance, list(weights.values()), most)
        elif most:
            self._factors = {linear: truncated_svd(weight, most) for linear, weight in weights.items()}

    def errors(
        self,
        samples: Sequence[torch.Tensor],
        gradients: Mapping[str, Sequence[torch.Tensor]],
        num_tokens: Sequence[int],
    ) -> dict[str, dict[int, float]]:
        """Compute the errors of four bits on some tokens of each sample, after the range phase has
        ended.

        Args:
            samples: raw inputs (tokens, in) float32 of each sample.
            gradients: for each linear and sample the gradient of the judged quantity at the
                linear's output, (tokens, out) float32.
            num_tokens: of each sample, how many tokens these represent.

        Returns:
            For each linear, rank to the mean over samples of `propagated_power`.
        """
        found: dict[str, dict[int, float]] = {name: {} for name in self._linears}
        tokens = torch.cat(list(samples))
        for rank in self._ranks:
            self._set_rank(rank)
            for name, linear in self._linears.items():
                layer = self._layer(linear.bias, self._round(linear, None, None), torch.ones(1)).at_bin(0)
                output = w4a4_linear(
                    tokens, layer.input_transform, layer.weight_tensors, layer.format, layer.activation_scale_rule
                )
                bias = None if linear.bias is None else linear.bias.float()
                error = output - nn.functional.linear(tokens, linear.weight.float(), bias)
                errors = error.split([len(each) for each in samples])
                powers = [propagated_power(*each) for each in zip(errors, gradients[name], num_tokens, strict=True)]
                found[name][rank] = max(sum(apart for apart, _ in powers), sum(whole for _, whole in powers))
                found[name][rank] /= len(powers)
        return found

    def _set_rank(self, rank: int) -> None:
        self._rank = rank
        if self._deflates:
            deflation = None
            if rank:
                factor, rotated = self._transform.smoothing_factor, self._recipe.rotation
                deflation = deflation_along(self._directions[:rank], self._covariance, factor, rotated)
            self._deflate(deflation)
        self._fit_offset()

    def _split(self, linear: nn.Linear) -> tuple[LowRankBranch | None, torch.Tensor]:
        if self._deflates and self._rank:
            return super()._split(linear)
        weight, factor = linear.weight.detach().float(), self._transform.smoothing_factor
        if not self._rank:
            branch, residual = svdquant(weight, factor, 0)
        else:
            up, down = self._factors[linear]
            branch, residual = split_with_factors(up[:, : self._rank], down[: self._rank], weight, factor)
        return branch, self._transform.rotate(residual)


def propagated_power(error: torch.Tensor, gradient: torch.Tensor, num_tokens: int) -> tuple[float, float]:
    """Estimate the power of an error where it is judged, from random signs there: E (Σ a)², a =
    error · gradient.

    Entries are not independent. The rounding error of a weight is the same at every token, and
    equal tokens are rounded alike; the rounding error of an input affects all outputs of its token
    at once. So squares, products within an output and products within a token are summed, each
    scaled to all represented tokens. Products across both are noise and left out.

    Args:
        error, gradient: (tokens, out) float32.
        num_tokens: how many tokens these represent.

    Returns:
        Σ a² alone, as for independent entries; and the whole sum, which noise can make smaller.
    """
    count = len(error)
    products = error * gradient
    squares = float(products.square().sum(dtype=torch.float64))
    within_outputs = float(products.sum(0, dtype=torch.float64).square().sum()) - squares
    within_tokens = float(products.sum(1, dtype=torch.float64).square().sum()) - squares
    pairs = num_tokens * (num_tokens - 1) / (count * (count - 1)) if count > 1 else 0.0
    apart = squares * num_tokens / count
    return apart, apart + within_tokens * num_tokens / count + within_outputs * pairs
