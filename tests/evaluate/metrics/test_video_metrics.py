import math

import numpy as np
import pytest

from tempoquant.errors import ModelError
from tempoquant.evaluate.metrics.video_metrics import psnr_db, ssim, temporal_flickering


def video(seed: int = 0, shape: tuple[int, ...] = (3, 17, 13, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_equal_videos_have_infinite_psnr_and_ssim_one():
    assert psnr_db(video(), video()) == math.inf
    assert ssim(video(), video()) == pytest.approx(1.0, abs=1e-12)


def test_both_metrics_are_symmetrical():
    assert psnr_db(video(0), video(1)) == psnr_db(video(1), video(0))
    assert ssim(video(0), video(1)) == pytest.approx(ssim(video(1), video(0)), abs=1e-12)


@pytest.mark.parametrize("difference", [1, 16, 255])
def test_a_constant_difference_gives_its_psnr(difference):
    black = np.zeros((2, 11, 11, 3), np.uint8)
    assert psnr_db(black, black + np.uint8(difference)) == pytest.approx(20 * math.log10(255 / difference))


def test_a_difference_does_not_wrap_around_eight_bits():
    black, white = np.zeros((1, 11, 11, 3), np.uint8), np.full((1, 11, 11, 3), 255, np.uint8)
    assert psnr_db(black, white) == psnr_db(white, black) == 0.0


def test_more_noise_means_less_of_both():
    clean = np.full((2, 32, 32, 3), 128, np.uint8)
    clean[:, 8:24, 8:24] = 40
    noise = np.random.default_rng(0).normal(size=clean.shape)
    noisy = [np.clip(clean + strength * noise, 0, 255).astype(np.uint8) for strength in (4, 16, 64)]
    for metric in (psnr_db, ssim):
        values = [metric(clean, other) for other in noisy]
        assert values == sorted(values, reverse=True)


def test_ssim_is_the_mean_over_frames():
    a, b = video(0, (4, 16, 16, 3)), video(1, (4, 16, 16, 3))
    per_frame = [ssim(a[i : i + 1], b[i : i + 1]) for i in range(4)]
    assert ssim(a, b) == pytest.approx(np.mean(per_frame), abs=1e-12)


@pytest.mark.parametrize("metric", [psnr_db, ssim])
def test_videos_of_other_sizes_are_refused(metric):
    with pytest.raises(ModelError, match="differ in size"):
        metric(video(), video()[:2])


def test_frames_below_the_window_are_refused():
    with pytest.raises(ModelError, match="at least 11 pixels"):
        ssim(video(shape=(1, 10, 32, 3)), video(shape=(1, 10, 32, 3)))


def test_flickering_is_vbenchs_formula():
    """Computed by hand: differences of 10 and 30 in every pixel, 20 on average: (255 − 20) /
    255.
    """
    video = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (100, 110, 80)])
    assert temporal_flickering(video) == pytest.approx((255 - 20) / 255)
    assert temporal_flickering(video[::-1]) == temporal_flickering(video)


def test_a_still_does_not_flicker_and_a_single_frame_has_no_score():
    assert temporal_flickering(np.full((5, 4, 4, 3), 7, np.uint8)) == 1.0
    assert temporal_flickering(np.zeros((1, 4, 4, 3), np.uint8)) is None


def test_black_to_white_is_the_worst_flickering():
    video = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (0, 255)])
    assert temporal_flickering(video) == 0.0
