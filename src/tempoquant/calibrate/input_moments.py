"""InputMoments: range, mean and covariance of an input, gathered a few thousand tokens at a time."""

import torch

from tempoquant.methods import HessianAccumulator


class InputMoments:
    """Range and moments of each input feature over calibration tokens.

    Args:
        in_features: width of the input.
        centred: whether `amax` and the covariance are about the mean; otherwise about zero.
        with_covariance: whether to gather it: (in, in) float32 numbers.
    """

    def __init__(
        self, in_features: int, device: torch.device | str = "cpu", centred: bool = False, with_covariance: bool = False
    ) -> None:
        self._centred = centred
        self._lowest = torch.full((in_features,), torch.inf, device=device)
        self._highest = -self._lowest
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._sum_of_squares = torch.zeros_like(self._sum)
        self._num_tokens = 0
        self._products = HessianAccumulator(in_features, device) if with_covariance else None
        # Sums are of differences from here, near the mean: squares of a mean far from zero would drown the rest.
        self._origin: torch.Tensor | None = None

    def add(self, x: torch.Tensor, extremes: torch.Tensor) -> None:
        """Take in tokens (tokens, in) of any float dtype; extremes: (2, in) float32, their smallest and largest."""
        if self._origin is None:
            mean = x.sum(0, dtype=torch.float64) / len(x)
            self._origin = mean.float() if self._centred else torch.zeros_like(self._lowest)
        shifted = x.float() - self._origin if self._centred else x.float()
        sums, squares = shifted.sum(0, dtype=torch.float64), shifted.square().sum(0, dtype=torch.float64)
        if self._products is not None:
            self._products.add(shifted)  # the first sum that changes: it is all that may not fit in memory
        self._lowest = torch.minimum(self._lowest, extremes[0])
        self._highest = torch.maximum(self._highest, extremes[1])
        self._sum += sums
        self._sum_of_squares += squares
        self._num_tokens += len(x)

    @property
    def mean(self) -> torch.Tensor:
        """(in,) float32: what inputs are centred about; zero when they are not."""
        if not self._centred or self._origin is None:
            return torch.zeros_like(self._lowest)
        return (self._origin.double() + self._from_origin).float()

    @property
    def amax(self) -> torch.Tensor:
        """(in,) float32: largest distance from the mean, or from zero."""
        mean = self.mean
        return torch.maximum(self._highest - mean, mean - self._lowest).clamp(min=0)

    @property
    def rms(self) -> torch.Tensor:
        """(in,) float32: root mean square of the distance from the mean, or from zero."""
        square = self._sum_of_squares / max(self._num_tokens, 1)
        if self._centred:
            square = square - self._from_origin.square()
        return square.clamp(min=0).sqrt().float()

    def take_covariance(self, smoothing_factor: torch.Tensor | None) -> torch.Tensor:
        """(in, in) float32: mean of x̃ᵀx̃ about the mean or zero, of the smoothed input. Its memory is handed over.

        Raises HessianError before any token has come.
        """
        assert self._products is not None
        covariance = self._products.take()
        if self._centred:
            covariance.addr_(difference := self._from_origin.float(), difference, alpha=-1)
        if smoothing_factor is not None:
            covariance.div_(smoothing_factor.float()).div_(smoothing_factor.float().unsqueeze(1))
        return covariance

    @property
    def _from_origin(self) -> torch.Tensor:
        """(in,) float64: how far the mean lies from the origin."""
        return self._sum / max(self._num_tokens, 1)
