"""InputMoments: range, means and covariance of an input, accumulated a few thousand tokens at a
time.
"""

import torch

from tempoquant.methods import HessianAccumulator, add_prior_, prior, prior_energy, shrunk_mean, typical_energy


class InputMoments:
    """The range and moments of each input feature over calibration tokens.

    Args:
        in_features: width of the input.
        device: where sums are kept.
        centred: whether ranges and moments are taken around the mean; otherwise around zero.
        with_covariance: whether to accumulate it: (in, in) float32 numbers.
        num_bins: timestep bins that tokens come from.
        by_bin: whether the tokens of each timestep bin are taken around their own mean.
        prior_fraction: share of a prior in each feature's mean square, in [0, 1), see
            `methods.prior`; covariance and Hessian have a quarter of it.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        centred: bool = False,
        with_covariance: bool = False,
        num_bins: int = 1,
        by_bin: bool = False,
        prior_fraction: float = 0.0,
    ) -> None:
        self._centred, self._by_bin, self._prior_fraction = centred, by_bin, prior_fraction
        self._lowest = torch.full((num_bins, in_features), torch.inf, device=device)
        self._highest = -self._lowest
        self._sum = torch.zeros(num_bins, in_features, dtype=torch.float64, device=device)
        self._sum_of_squares = torch.zeros_like(self._sum)
        self._num_tokens = torch.zeros(num_bins, 1, dtype=torch.float64, device=device)
        self._products = HessianAccumulator(in_features, device) if with_covariance else None
        # Sums hold differences from this origin near the mean: squares of a mean far from zero
        # would drown the rest.
        self._origin: torch.Tensor | None = None

    def add(self, x: torch.Tensor, extremes: torch.Tensor, timestep_bin: int = 0) -> None:
        """Add tokens (tokens, in) of any float dtype; extremes, (2, in) float32, are their smallest
        and largest.
        """
        if self._origin is None:
            mean = x.sum(0, dtype=torch.float64) / len(x)
            self._origin = mean.float() if self._centred else torch.zeros_like(self._lowest[0])
        shifted = x.float() - self._origin if self._centred else x.float()
        sums, squares = shifted.sum(0, dtype=torch.float64), shifted.square().sum(0, dtype=torch.float64)
        if self._products is not None:
            self._products.add(shifted)  # the first sum that changes, and the only one that may not fit in memory
        self._lowest[timestep_bin] = torch.minimum(self._lowest[timestep_bin], extremes[0])
        self._highest[timestep_bin] = torch.maximum(self._highest[timestep_bin], extremes[1])
        self._sum[timestep_bin] += sums
        self._sum_of_squares[timestep_bin] += squares
        self._num_tokens[timestep_bin] += len(x)

    @property
    def means(self) -> torch.Tensor:
        """Return the centre of each timestep bin's inputs, (num_bins, in) float32; zero without
        centring.
        """
        if not self._centred or self._origin is None:
            return torch.zeros_like(self._lowest)
        return (self._origin.double() + self._from_origin).float()

    @property
    def amax(self) -> torch.Tensor:
        """Return the largest distance from the mean of its bin, or from zero: (in,) float32."""
        means = self.means
        distance = torch.maximum(self._highest - means, means - self._lowest).clamp(min=0)
        return distance.amax(0)

    @property
    def rms(self) -> torch.Tensor:
        """Return the root mean square of the distance from the mean of its bin, or from zero, with
        the prior: (in,) float32.
        """
        share = prior.share(self._prior_fraction, self._total_tokens)
        return ((1 - share) * self._variance + share * self._prior_energy).sqrt().float()

    @property
    def plain_rms(self) -> torch.Tensor:
        """Return the same root mean square without the prior: (in,) float32."""
        return self._variance.sqrt().float()

    @property
    def typical_rms(self) -> float:
        """Return the root mean square of an ordinary feature, see
        `methods.prior.typical_energy`.
        """
        return float(typical_energy(self._variance, self._mean_square, self._total_tokens).sqrt())

    @property
    def rms_by_bin(self) -> torch.Tensor:
        """Return the root mean square in each timestep bin without the prior, (num_bins, in)
        float32; NaN for a bin without tokens.
        """
        return (self._square_sums / self._num_tokens).clamp(min=0).sqrt().float()

    def add_prior_(
        self, moments: torch.Tensor, smoothing_factor: torch.Tensor | None, rotated: bool = False
    ) -> torch.Tensor:
        """Mix a covariance or Hessian (in, in) of smoothed inputs with the prior's share, in place,
        and return it.
        """
        share = prior.share(self._prior_fraction * prior.MATRIX_FRACTION, self._total_tokens)
        energy = self._prior_energy
        energy = energy if smoothing_factor is None else energy / smoothing_factor.double().square()
        return add_prior_(moments, energy, share, rotated)

    def with_prior(
        self, cross_covariance: torch.Tensor, directions: torch.Tensor, factor: torch.Tensor, scale: float = 1.0
    ) -> torch.Tensor:
        """Mix directions (rank, in) times a covariance of smoothed inputs, (rank, in), with the
        prior's share.

        Args:
            scale: energy of these inputs divided by that of all.
        """
        share = prior.share(self._prior_fraction * prior.MATRIX_FRACTION, self._total_tokens)
        energy = (self._prior_energy / factor.double().square()).float()
        return (1 - share) * cross_covariance + share * scale * directions * energy

    def take_covariance(self, smoothing_factor: torch.Tensor | None) -> torch.Tensor:
        """Compute the mean of x̃ᵀx̃ of the smoothed input, with the prior, (in, in) float32, and
        give up its memory.

        x̃ is taken around the mean of its bin, or around zero. Raises HessianError before any token
        has come.
        """
        assert self._products is not None
        covariance = self._products.take()
        if self._centred:
            shares = self._num_tokens / self._num_tokens.sum()
            own = self._sum / self._num_tokens.clamp(min=1)
            for share, mean, centre in zip(shares, own.float(), self._from_origin.float(), strict=True):
                covariance.addr_(mean, mean, alpha=-float(share))
                covariance.addr_(mean - centre, mean - centre, alpha=float(share))
        if smoothing_factor is not None:
            covariance.div_(smoothing_factor.float()).div_(smoothing_factor.float().unsqueeze(1))
        return self.add_prior_(covariance, smoothing_factor)

    @property
    def _total_tokens(self) -> float:
        return float(self._num_tokens.sum())

    @property
    def _prior_energy(self) -> torch.Tensor:
        return prior_energy(self._variance, self._mean_square, self._total_tokens)

    @property
    def _from_origin(self) -> torch.Tensor:
        """Return the centre of each bin relative to the origin, (num_bins, in) float64.

        The centre is the mean; with a prior, the part of the mean that is certain.
        """
        sums, squares, num_tokens = self._sum, self._sum_of_squares, self._num_tokens
        if not self._by_bin:
            sums, squares, num_tokens = (each.sum(0, keepdim=True) for each in (sums, squares, num_tokens))
        mean = sums / num_tokens.clamp(min=1)
        if self._prior_fraction and self._origin is not None:
            variance = (squares / num_tokens.clamp(min=1) - mean.square()).clamp(min=0)
            mean = shrunk_mean(mean + self._origin, variance, num_tokens) - self._origin
        pooled = self._sum.sum(0) / max(self._total_tokens, 1)
        return torch.where(num_tokens > 0, mean, pooled).expand_as(self._sum)  # a bin without tokens: pooled

    @property
    def _mean_square(self) -> torch.Tensor:
        """Return the mean square of each feature, (in,) float64."""
        squares = self._sum_of_squares.sum(0)
        if self._origin is not None:
            origin = self._origin.double()
            squares = squares + 2 * origin * self._sum.sum(0) + self._total_tokens * origin.square()
        return (squares / max(self._total_tokens, 1)).clamp(min=0)

    @property
    def _square_sums(self) -> torch.Tensor:
        """Return the sum over tokens of squared distances from the centre, or from zero: (num_bins,
        in) float64.
        """
        if not self._centred:
            return self._sum_of_squares
        centre = self._from_origin
        return self._sum_of_squares - 2 * centre * self._sum + self._num_tokens * centre.square()

    @property
    def _variance(self) -> torch.Tensor:
        """Return the mean square of the distance from the centre, or from zero, without the prior:
        (in,) float64.
        """
        return (self._square_sums.sum(0) / max(self._total_tokens, 1)).clamp(min=0)
