"""Means and medians with 95 % bootstrap intervals, of values and of paired differences.

Pairs are items: both models got the same image, prompt and noise, so an item's difference does not
contain the items' own spread. Several seeds of one item are no independent evidence: they are
averaged first.
"""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from tempoquant.errors import ModelError

Key = TypeVar("Key", bound=Hashable)

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
FEWEST_ITEMS = 5
"""The fewest items for an interval: with three items, the least resampled mean alone has a chance
of 3⁻³, more than a tail's 2.5 %.
"""
_SEED = 0
_BATCH = 1000  # resamples at once, which bounds the memory


@dataclass(frozen=True)
class Interval:
    """A mean and its probable range.

    Attributes:
        mean: of the items.
        low, high: ends of the percentile bootstrap interval; None for fewer than FEWEST_ITEMS.
        n: number of items.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def holds_zero(self) -> bool | None:
        """Return whether no difference is plausible; None without an interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


@dataclass(frozen=True)
class Median:
    """A median and its probable range; `low`, `high` and `n` as in `Interval`."""

    median: float
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float], num_resamples: int = NUM_RESAMPLES) -> Interval:
    """Compute the mean and its 95 % percentile bootstrap interval; equal values give equal results.

    Raises ModelError for no value, NaN and infinity.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ModelError(f"a mean needs finite values, not {list(values)}.")
    low, high = _bounds(values, np.mean, num_resamples)
    return Interval(math.fsum(values) / len(values), low, high, len(values))


def median_interval(values: Sequence[float], num_resamples: int = NUM_RESAMPLES) -> Median | None:
    """Compute the median and its 95 % percentile bootstrap interval; None for no value."""
    if not values:
        return None
    low, high = _bounds(values, np.median, num_resamples)
    return Median(statistics.median(values), low, high, len(values))


def _bounds(
    values: Sequence[float], statistic: Callable[..., Any], num_resamples: int
) -> tuple[float, float] | tuple[None, None]:
    if len(values) < FEWEST_ITEMS:
        return None, None
    found = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        statistic,
        confidence_level=CONFIDENCE,
        n_resamples=num_resamples,
        method="percentile",
        rng=np.random.default_rng(_SEED),
        batch=_BATCH,
    ).confidence_interval
    return float(found.low), float(found.high)


def paired_difference(
    first: Mapping[Key, float], second: Mapping[Key, float], num_resamples: int = NUM_RESAMPLES
) -> Interval | None:
    """Compute second minus first, over the items that both have; None without any."""
    both = [key for key in first if key in second]
    return mean_interval([second[key] - first[key] for key in both], num_resamples) if both else None


def resampled_interval(
    statistic: Callable[[NDArray[np.intp]], NDArray[np.float64]], n: int, num_resamples: int = NUM_RESAMPLES
) -> Interval:
    """Compute a statistic of n items, with the 95 % percentile bootstrap interval over them.

    Args:
        statistic: takes indices of items, (…, n), and returns a number for each row of them.

    There is no interval below FEWEST_ITEMS, and none if a resample has no finite value.
    """
    value = float(statistic(np.arange(n)))
    if n < FEWEST_ITEMS:
        return Interval(value, None, None, n)
    generator = np.random.default_rng(_SEED)
    values = np.concatenate(
        [
            statistic(generator.integers(n, size=(min(_BATCH, num_resamples - begin), n)))
            for begin in range(0, num_resamples, _BATCH)
        ]
    )
    if not np.isfinite(values).all():
        return Interval(value, None, None, n)
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high), n)


def mean_by_item(values: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    """Average over the seeds of each item, in the order of first appearance."""
    by_item: dict[Key, list[float]] = {}
    for item, value in values:
        by_item.setdefault(item, []).append(value)
    return {item: math.fsum(found) / len(found) for item, found in by_item.items()}
