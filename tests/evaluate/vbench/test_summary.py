"""Means, differences and drops out of VBench's scores."""

import json

import numpy as np
import pytest

from tempoquant.evaluate.evaluation_folder import Take
from tempoquant.evaluate.metrics.statistics import FEWEST_ITEMS, mean_interval, resampled_interval
from tempoquant.evaluate.vbench.dimensions import DEFAULT, DIMENSIONS
from tempoquant.evaluate.vbench.scores import Failure
from tempoquant.evaluate.vbench.settings import VBench, VBenchSettings
from tempoquant.evaluate.vbench.summary import METRICS, relative_drop, vbench_record

NUM_ITEMS = 8
TWO = ("dynamic_degree", "overall_consistency")


def scores_of(**by_label):
    """Return {dimension: {take: score}} from {label: {dimension: [score of each item]}}."""
    scores = {}
    for label, dimensions in by_label.items():
        for dimension, values in dimensions.items():
            for place, value in enumerate(values):
                scores.setdefault(dimension, {})[Take(label, f"item {place}", 0)] = value
    return scores


def record_of(scores, failures=(), labels=("reference", "model"), dimensions=TWO):
    weights = {name: {"a.pth": "12", f"{name}.pth": "34"} for name in dimensions}
    settings = VBenchSettings(None, dimensions, None)
    vbench = VBench(settings, {"vbench": "0.1.5", "torch": "2", "python": "3.11"}, "cpu", {}, weights)
    return vbench_record(vbench, scores, list(failures), labels)


@pytest.fixture
def record():
    dynamic, overall = [1.0] * 6 + [0.0] * 2, [0.18] * 4 + [0.22] * 4
    return record_of(
        scores_of(
            reference={"dynamic_degree": dynamic, "overall_consistency": overall},
            model={"dynamic_degree": [1.0] * 3 + [0.0] * 5, "overall_consistency": [0.9 * score for score in overall]},
        )
    )


def row_of(record, label, metric):
    return next(row for row in record["summary"] if (row["label"], row["metric"]) == (label, metric))


def test_raw_normalised_and_their_means_are_vbenchs(record):
    model = record["models"]["reference"]
    assert model["raw"] == pytest.approx({"dynamic_degree": 0.75, "overall_consistency": 0.2})
    assert model["normalised"] == pytest.approx({"dynamic_degree": 0.75, "overall_consistency": 0.2 / 0.364})
    assert model["raw_mean"] == pytest.approx((0.75 + 0.2) / 2)
    # VBench counts dynamic degree half.
    assert model["normalised_mean"] == pytest.approx((0.5 * 0.75 + 0.2 / 0.364) / 1.5)
    assert model["relative_drop"] is None and model["relative_drop_of"] == {}


def test_the_drop_is_the_mean_of_the_drops_of_the_dimensions_and_not_the_drop_of_the_mean(record):
    model = record["models"]["model"]
    assert model["relative_drop_of"]["dynamic_degree"]["drop"] == pytest.approx(0.5)
    assert model["relative_drop_of"]["overall_consistency"]["drop"] == pytest.approx(0.1)
    assert model["relative_drop"] == pytest.approx(0.3)
    row = row_of(record, "model", "vbench_relative_drop")
    assert row["low"] < row["mean"] == pytest.approx(0.3) and row["high"] > 0.3
    assert "30.00 % lower than the reference" in row["words"]


def test_a_constant_factor_drops_alike_in_every_resample(record):
    drop = record["models"]["model"]["relative_drop_of"]["overall_consistency"]
    assert (drop["low"], drop["high"]) == pytest.approx((0.1, 0.1))


def test_rows_have_paired_differences_and_say_when_they_may_be_noise(record):
    row = row_of(record, "model", "vbench_overall_consistency")
    assert row["difference"] == pytest.approx(row["mean"] - row["reference_mean"]) == pytest.approx(-0.02)
    assert row["high"] < 0 and row["within_noise"] is False
    same = [0.9, 0.8, 0.7, 0.9, 0.8, 0.7]
    shuffled = [0.8, 0.9, 0.7, 0.9, 0.7, 0.8]
    found = record_of(
        scores_of(reference={"imaging_quality": same}, model={"imaging_quality": shuffled}),
        dimensions=("imaging_quality",),
    )
    for metric in ("vbench_imaging_quality", "vbench_raw_mean", "vbench_relative_drop"):
        row = row_of(found, "model", metric)
        assert row["within_noise"] is True and "within noise" in row["words"]


def test_seeds_of_an_item_are_one_piece_of_evidence():
    scores = {"imaging_quality": {Take("reference", f"item {i}", seed): 0.5 for i in range(3) for seed in range(4)}}
    found = record_of(scores, labels=("reference",), dimensions=("imaging_quality",))
    assert row_of(found, "reference", "vbench_imaging_quality")["n"] == 3
    assert found["models"]["reference"]["num_items"] == 3


def test_a_dimension_that_failed_leaves_no_mean_over_fewer_dimensions():
    values = [0.5, 0.6, 0.7, 0.8, 0.9]
    scores = {
        **scores_of(reference={"imaging_quality": values}, model={"imaging_quality": values}),
        "dynamic_degree": {},
    }
    failure = Failure("dynamic_degree", None, "OSError: unreadable")
    found = record_of(scores, [failure], dimensions=("imaging_quality", "dynamic_degree"))
    model = found["models"]["model"]
    assert (model["raw_mean"], model["normalised_mean"], model["relative_drop"], model["num_items"]) == (
        None,
        None,
        None,
        0,
    )
    assert model["raw"] == pytest.approx({"imaging_quality": 0.7, "dynamic_degree": None})
    assert found["failed"] == [{"dimension": "dynamic_degree", "why": "OSError: unreadable"}]


def test_items_that_one_side_lacks_are_in_no_mean():
    scores = scores_of(
        reference={"imaging_quality": [0.5] * 5, "dynamic_degree": [1.0] * 5},
        model={"imaging_quality": [0.5] * 5 + [0.0], "dynamic_degree": [1.0] * 4},
    )
    model = record_of(scores, dimensions=("imaging_quality", "dynamic_degree"))["models"]["model"]
    assert model["raw"] == {"imaging_quality": 0.5, "dynamic_degree": 1.0}
    assert model["num_items"] == 4 and model["relative_drop"] == 0.0


def test_nothing_drops_from_zero():
    nothing = {"dynamic_degree": {f"item {place}": 0.0 for place in range(NUM_ITEMS)}}
    assert relative_drop(nothing, nothing) is None
    rare = {"dynamic_degree": {**nothing["dynamic_degree"], "item 0": 1.0}}
    found = relative_drop(nothing, rare)
    # Some resamples of the reference hold no motion at all.
    assert found.mean == 1.0 and found.low is found.high is None


def test_the_record_is_json_and_says_what_it_was_made_with(record):
    json.dumps(record, allow_nan=False)
    assert record["version"] == "0.1.5" and record["dimensions"] == list(TWO)
    assert record["weights"] == [
        {"file": "a.pth", "sha256": "12"},
        {"file": "dynamic_degree.pth", "sha256": "34"},
        {"file": "overall_consistency.pth", "sha256": "34"},
    ]
    assert {row["metric"] for row in record["summary"]} <= set(METRICS)


def test_vbenchs_bounds_are_normalised_to_zero_and_one():
    for name, dimension in DIMENSIONS.items():
        assert dimension.normalised(dimension.lowest) == 0 and dimension.normalised(dimension.highest) == 1, name


def test_the_default_leaves_out_what_is_measured_better_here_and_nothing_else():
    assert set(DIMENSIONS) - set(DEFAULT) == {"temporal_flickering"}


def test_a_resampled_mean_has_the_interval_of_the_mean():
    values = np.random.default_rng(3).normal(5, 2, 40)
    ours = resampled_interval(lambda indices: values[indices].mean(axis=-1), len(values))
    theirs = mean_interval(list(values))
    spread = theirs.high - theirs.low
    # Both are percentiles of 9999 resamples, drawn apart: each end has a standard error of about 2
    # % of the interval.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * spread)
    assert ours.mean == pytest.approx(theirs.mean)
    few = resampled_interval(lambda indices: values[indices].mean(axis=-1), FEWEST_ITEMS - 1)
    assert few.low is few.high is None
