"""Metrics of one video against another of the same prompt and seed (PSNR and SSIM), and of its
steadiness (flickering).

The first two tell how *close* two videos are, not how good one is: a quantized model may follow the
prompt just as well with other pixels. They are read beside prompt adherence.
"""

import itertools
import math

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from tempoquant.errors import ModelError

Video = NDArray[np.uint8]
"""(frames, height, width, 3), RGB, 0 … 255."""

SSIM_WINDOW = 11
"""Width of the Gaussian window of Wang et al. 2004 (sigma 1.5), pixels: no frame may be smaller."""


def psnr_db(reference: Video, other: Video) -> float:
    """Compute the peak signal-to-noise ratio of a whole video, 10·log₁₀(255² / mean squared error),
    in decibels.

    It is symmetric, and +inf for equal videos. Raises ModelError if the sizes differ.
    """
    _check_sizes(reference, other)
    error = reference.astype(np.float64) - other.astype(np.float64)
    mean_squared_error = float(np.mean(error * error))
    return math.inf if mean_squared_error == 0 else 10 * math.log10(255.0**2 / mean_squared_error)


def ssim(reference: Video, other: Video) -> float:
    """Compute the mean structural similarity over frames and channels, in [−1, 1]; 1 for equal
    videos.

    As in Wang et al. 2004: Gaussian window (sigma 1.5), K = (0.01, 0.03), population covariance. It
    is symmetric. Raises ModelError if the sizes differ or a frame is smaller than the window.
    """
    _check_sizes(reference, other)
    if min(reference.shape[1:3]) < SSIM_WINDOW:
        raise ModelError(f"SSIM needs frames of at least {SSIM_WINDOW} pixels, not {reference.shape[1:3]}.")
    per_frame = [
        structural_similarity(a, b, channel_axis=-1, data_range=255, gaussian_weights=True, use_sample_covariance=False)
        for a, b in zip(reference, other, strict=True)
    ]
    return float(np.mean(per_frame))


def temporal_flickering(video: Video) -> float | None:
    """Compute VBench's score: (255 − mean absolute difference of consecutive frames) / 255, 1 for a
    still; None for one frame.

    It is made for scenes that should stand still: a model that freezes everything scores best.
    """
    if len(video) < 2:
        return None
    frames = video.astype(np.int16)
    differences = [float(np.mean(np.abs(after - before))) for before, after in itertools.pairwise(frames)]
    return (255.0 - float(np.mean(differences))) / 255.0


def _check_sizes(reference: Video, other: Video) -> None:
    if reference.shape != other.shape:
        raise ModelError(f"videos to compare differ in size: {reference.shape} and {other.shape}.")
