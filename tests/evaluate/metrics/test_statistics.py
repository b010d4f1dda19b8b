import math

import numpy as np
import pytest

from tempoquant.errors import ModelError
from tempoquant.evaluate.metrics.statistics import FEWEST_ITEMS, mean_by_item, mean_interval, paired_difference


def test_the_interval_holds_the_true_mean_about_95_times_in_100():
    """400 samples of 24: the share that holds it has a standard deviation of 1.1 points; the
    percentile interval of so few is known to be a little narrow.
    """
    generator = np.random.default_rng(0)
    samples = generator.exponential(1.0, (200, 24)).tolist() + (1 + generator.standard_normal((200, 24))).tolist()
    found = [mean_interval(sample, num_resamples=500) for sample in samples]
    share = sum(interval.low <= 1 <= interval.high for interval in found) / len(found)
    assert 0.87 < share < 0.98


def test_the_interval_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(1).standard_normal(100).tolist()
    found = mean_interval(values)
    standard_error = np.std(values) / math.sqrt(len(values))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * standard_error, rel=0.05)
    assert found.mean == pytest.approx(np.mean(values))


def test_pairing_takes_the_items_own_spread_out():
    generator = np.random.default_rng(2)
    first = {index: float(value) for index, value in enumerate(100 * generator.standard_normal(24))}
    second = {index: value + 1 + 0.1 * generator.standard_normal() for index, value in first.items()}
    found = paired_difference(first, second)
    assert 0.9 < found.low < found.mean < found.high < 1.1
    assert found.holds_zero is False
    assert mean_interval(list(second.values())).holds_zero is True  # which the values alone would not show


def test_the_difference_is_second_minus_first_over_common_items():
    found = paired_difference({"a": 1.0, "b": 2.0}, {"b": 5.0, "c": 9.0})
    assert (found.mean, found.n, found.low, found.holds_zero) == (3.0, 1, None, None)
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None


def test_equal_values_have_an_interval_of_no_width():
    found = mean_interval([0.5] * 24)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_few_items_have_no_interval():
    assert mean_interval([1.0] * (FEWEST_ITEMS - 1)).low is None
    assert mean_interval([1.0] * FEWEST_ITEMS).low == 1.0


def test_the_same_values_have_the_same_interval():
    values = np.random.default_rng(3).standard_normal(10).tolist()
    assert mean_interval(values) == mean_interval(values)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_has_no_mean_is_an_error(values):
    with pytest.raises(ModelError, match="finite values"):
        mean_interval(values)


def test_seeds_of_an_item_count_once():
    assert mean_by_item([("a", 1.0), ("b", 5.0), ("a", 3.0)]) == {"a": 2.0, "b": 5.0}
