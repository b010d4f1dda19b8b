"""Costs of a model from the manifest's lines."""

import statistics

import numpy as np
import pytest

from tempoquant.evaluate.cost_summaries import ON_CPU, costs_of, notes
from tempoquant.evaluate.evaluation_folder import Take
from tempoquant.evaluate.metrics.statistics import FEWEST_ITEMS, median_interval


def line(seconds, rss=1.0, gpu=None):
    return {"seconds_per_step": seconds, "peak_rss_gib": rss, "peak_gpu_gib": gpu}


def lines_of(seconds, label="ours", **costs):
    return {Take(label, f"item {index}", 0): line(value, **costs) for index, value in enumerate(seconds)}


def test_a_model_twice_as_slow_on_every_item_is_exactly_twice_as_slow_whatever_items_cost():
    of_reference = [1.0, 5.0, 2.0, 40.0, 3.0, 0.5]
    lines = lines_of(of_reference, "16-bit") | lines_of([2 * value for value in of_reference])
    found = costs_of(lines, "ours", "16-bit")
    assert found["seconds_per_step_ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 6}
    assert found["seconds_per_step"]["median"] == 2 * statistics.median(of_reference)
    assert found["seconds_per_step"]["low"] < found["seconds_per_step"]["high"]
    assert costs_of(lines, "16-bit", "16-bit")["seconds_per_step_ratio"] is None


def test_seeds_of_one_item_are_one_item():
    lines = {Take("ours", "a", seed): line(seconds) for seed, seconds in enumerate((1.0, 3.0))}
    assert costs_of(lines, "ours", "16-bit")["seconds_per_step"] == {"median": 2.0, "low": None, "high": None, "n": 1}


def test_items_that_one_side_lacks_are_no_pair():
    lines = lines_of([1.0] * 3, "16-bit") | lines_of([4.0] * 5)
    lines[Take("16-bit", "item 1", 0)] = {"failed": "out of memory"}
    found = costs_of(lines, "ours", "16-bit")
    assert (found["seconds_per_step"]["n"], found["seconds_per_step_ratio"]["n"]) == (5, 2)


def test_times_of_different_devices_are_no_pair():
    lines = lines_of([1.0] * 3, "16-bit") | lines_of([4.0] * 3)
    for take, found in lines.items():
        found["device"] = "B" if take == Take("16-bit", "item 0", 0) else "A"
    found = costs_of(lines, "ours", "16-bit")
    assert (found["seconds_per_step"]["n"], found["seconds_per_step_ratio"]["n"]) == (3, 2)


def test_memory_is_the_most_and_the_least_of_all_videos_by_phase():
    lines = lines_of([1.0], rss=2.0, gpu={"denoising": 3.0, "decoding": 1.0})
    lines[Take("ours", "b", 0)] = line(1.0, rss=None, gpu={"denoising": 5.0})
    found = costs_of(lines, "ours", "16-bit")
    assert found["peak_rss_gib"] == {"most": 2.0, "least": 2.0, "n": 1}
    assert found["peak_gpu_gib"] == {
        "denoising": {"most": 5.0, "least": 3.0, "n": 2}, "decoding": {"most": 1.0, "least": 1.0, "n": 1},
    }  # fmt: skip


def test_a_model_that_made_nothing_costs_nothing_known():
    assert set(costs_of({Take("ours", "a", 0): {"failed": "x"}}, "ours", "16-bit").values()) == {None}


def test_times_of_a_cpu_are_said_to_mean_little():
    assert (notes("cpu"), notes("cuda:1")) == ([ON_CPU], [])


def test_the_interval_of_a_median_holds_the_true_one_about_95_times_in_100():
    generator = np.random.default_rng(0)
    found = [median_interval(sample, 500) for sample in generator.exponential(1.0, (300, 24)).tolist()]
    share = sum(each.low <= np.log(2) <= each.high for each in found) / len(found)
    assert 0.87 < share < 0.99  # the share itself has a standard deviation of 1.3 points
    assert all(each.low <= each.median <= each.high for each in found)


def test_one_outlier_does_not_move_a_median():
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.0]
    assert median_interval([*values, 1000.0]).median == pytest.approx(median_interval(values).median, abs=0.05)


def test_few_items_have_a_median_and_no_interval():
    assert median_interval([]) is None
    assert median_interval([2.0] * (FEWEST_ITEMS - 1)).low is None
    assert median_interval([2.0] * FEWEST_ITEMS).low == 2.0
