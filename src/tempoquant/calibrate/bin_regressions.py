"""BinRegressions: the deflation of each timestep bin, along the directions that all bins share."""

import torch

from tempoquant.calibrate.input_moments import InputMoments
from tempoquant.methods import Deflation, regression
from tempoquant.methods.prior import PSEUDO_TOKENS


class BinRegressions:
    """The regressions of the smoothed input on the branch's h = x · downᵀ in each timestep bin,
    around the bin's mean.

    Only the product of a covariance with the directions is kept, (rank, in) for each bin.

    Args:
        shared: the deflation of all bins together; its directions stay.
        smoothing_factor: (in,) bfloat16, or None.
        means: (num_bins, in) float32, of each bin.
    """

    def __init__(self, shared: Deflation, smoothing_factor: torch.Tensor | None, means: torch.Tensor) -> None:
        self._down, self._means = shared.down, means
        self._factor = means.new_ones(means.shape[1]) if smoothing_factor is None else smoothing_factor.float()
        self._cross_covariance = means.new_zeros(len(means), *shared.down.shape)
        self._num_tokens = [0] * len(means)

    def add(self, x: torch.Tensor, timestep_bin: int) -> None:
        """Add raw tokens (tokens, in) of one bin."""
        centred = x.float() - self._means[timestep_bin]
        self._cross_covariance[timestep_bin] += (centred @ self._down.float().T).T @ (centred / self._factor)
        self._num_tokens[timestep_bin] += len(x)

    def deflation(self, moments: InputMoments, rotated: bool) -> Deflation:
        """Compute the regression of each bin: (num_bins, in, rank).

        Each bin's covariance is mixed with that of all bins, scaled to its energy, as if
        PSEUDO_TOKENS of its tokens came from all bins. A bin without tokens takes the covariance of
        all bins.
        """
        stored = self._down.float() * self._factor
        pooled = self._cross_covariance.sum(0) / max(sum(self._num_tokens), 1)
        pooled = moments.with_prior(pooled, stored, self._factor)
        found = []
        for cross_covariance, count in zip(self._cross_covariance, self._num_tokens, strict=True):
            own = cross_covariance / max(count, 1)
            energies = [float(((each @ stored.T).diagonal()).sum()) for each in (own, pooled)]
            scale = energies[0] / energies[1] if count and energies[1] > 0 else 1.0
            mixed = (count * own + PSEUDO_TOKENS * scale * pooled) / (count + PSEUDO_TOKENS)
            found.append(regression(moments.with_prior(mixed, stored, self._factor, scale), stored, rotated))
        return Deflation(self._down, torch.stack(found))
