import pytest

from tempoquant.report.metrics import METRICS, flat_metrics, metric_of, place_of


def test_a_lower_value_is_a_larger_loss_where_more_is_better():
    psnr = metric_of("psnr_db")
    assert psnr.loss(20.0, None) > psnr.loss(30.0, None)


def test_what_is_measured_alone_loses_by_its_distance_from_16_bit():
    flickering = metric_of("temporal_flickering")
    assert flickering.loss(0.90, 0.95) == pytest.approx(0.05)
    assert flickering.loss(0.97, 0.95) == pytest.approx(-0.02)
    assert flickering.loss(0.90, None) is None


def test_of_a_measure_nobody_knows_any_change_is_a_loss():
    unknown = metric_of("shininess_index")
    assert unknown.title == "shininess index"
    assert unknown.loss(1.0, 3.0) == unknown.loss(5.0, 3.0) == 2.0


def test_what_was_not_measured_is_no_loss_and_no_zero():
    for metric in METRICS.values():
        assert metric.loss(None, 1.0) is None
        assert metric.text(None) == "–"


def test_a_number_is_written_with_a_real_minus_and_never_minus_zero():
    psnr = metric_of("psnr_db")
    assert psnr.text(-3.26) == "−3.3 dB"
    assert psnr.text(-0.04) == "0.0 dB"
    assert metric_of("motion_followed").text(0.8) == "80 %"


def test_parts_of_a_metric_become_keys_of_their_own_and_come_last():
    flat = flat_metrics({"sqnr_db": {"high_noise bin 0": 20.5}, "ssim": 0.9, "vmaf": None, "motion_followed": True})
    assert flat == {"sqnr_db high_noise bin 0": 20.5, "ssim": 0.9, "motion_followed": 1.0}
    assert metric_of("sqnr_db high_noise bin 0").title == "SQNR of the latent after high noise bin 0"
    assert sorted(flat, key=place_of)[-1] == "sqnr_db high_noise bin 0"
