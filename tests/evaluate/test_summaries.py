import pytest

from tempoquant.evaluate.evaluation_folder import Take
from tempoquant.evaluate.summaries import metric_of, pairs, summarize

LABELS, BINS = ["16-bit", "a", "b"], ["low_noise bin 0"]


def measured(name, **by_label):
    """Return values of items 0, 1, … of each label; None for an item that failed."""
    return {
        Take(label.replace("ref", "16-bit"), str(index), 0): {name: value}
        for label, values in by_label.items()
        for index, value in enumerate(values)
        if value is not None
    }


def rows_of(found):
    return {(row["label"], row["metric"]): row for row in summarize(found, LABELS, BINS)}


def test_a_constant_loss_is_no_noise_and_a_loss_of_some_items_is():
    ref = [0.9, 0.8, 0.7, 0.9, 0.8, 0.7]
    found = measured("temporal_flickering", ref=ref, a=[value - 0.1 for value in ref],
                     b=[0.9, 0.9, 0.6, 0.9, 0.8, 0.7])  # fmt: skip
    rows = rows_of(found)
    a, b = rows["a", "temporal_flickering"], rows["b", "temporal_flickering"]
    assert (a["difference"], a["low"], a["within_noise"]) == (pytest.approx(-0.1), pytest.approx(-0.1), False)
    assert a["words"].startswith("0.7000, 0.1000 below the reference (−0.1000 to −0.1000, n = 6)")
    assert b["within_noise"] is True and b["words"].endswith(": within noise")


def test_mean_minus_reference_mean_is_the_difference_also_where_items_failed():
    found = measured(
        "temporal_flickering", ref=[0.9, None, 0.5, 0.7, 0.6, 0.6, 0.4], a=[0.8, 0.1, None, 0.7, 0.6, 0.5, 0.4]
    )
    row = rows_of(found)["a", "temporal_flickering"]
    assert row["n"] == 5
    assert row["mean"] - row["reference_mean"] == pytest.approx(row["difference"]) == pytest.approx(-0.04)


def test_a_distance_has_a_mean_with_an_interval():
    row = rows_of(measured("psnr_db", a=[30.0, 31.0, 32.0, 33.0, 34.0]))["a", "psnr_db"]
    assert (row["mean"], row["n"], row["difference"], row["reference_mean"]) == (32.0, 5, None, None)
    assert 30 < row["low"] < 32 < row["high"] < 34
    assert row["words"].startswith("32.00 dB (")


def test_two_items_have_no_interval_and_the_words_say_so():
    row = rows_of(measured("psnr_db", a=[30.0, 31.0]))["a", "psnr_db"]
    assert (row["low"], row["words"]) == (None, "30.50 dB (n = 2: too few for an interval)")


def test_models_are_compared_second_minus_first():
    [row] = pairs(measured("psnr_db", a=[30.0] * 6, b=[31.0] * 6), LABELS, BINS)
    assert (row["first"], row["second"], row["difference"], row["within_noise"]) == ("a", "b", 1.0, False)
    assert row["words"] == "b is 1.00 dB above a (1.00 dB to 1.00 dB, n = 6)"


def test_bins_have_rows_of_their_own():
    found = measured("sqnr_db", a=[{"low_noise bin 0": 20.0}] * 5)
    assert rows_of(found)["a", "sqnr_db low_noise bin 0"]["mean"] == 20.0
    assert metric_of("sqnr_db low_noise bin 0").words == "SQNR of the latent after low_noise bin 0"


def test_verdicts_become_shares_and_what_was_not_measured_has_no_row():
    rows = rows_of(measured("motion_followed", ref=[True] * 6, a=[True, False, True, True, True, True], b=[None] * 6))
    assert rows["a", "motion_followed"]["mean"] == pytest.approx(5 / 6)
    assert ("b", "motion_followed") not in rows
