import numpy as np
import pytest

from tempoquant.errors import ModelError
from tempoquant.evaluate.files import write_lossless
from tempoquant.evaluate.metrics import vmaf as module
from tempoquant.evaluate.metrics.measures import measures, notes
from tempoquant.evaluate.metrics.vmaf import has_libvmaf, vmaf


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return a moving pattern of 240 pixels, and the same with noise."""
    folder = tmp_path_factory.mktemp("clips")
    rows, columns = np.indices((240, 320))
    frames = [127 + 100 * np.sin((rows + 2 * columns + 6 * t) / 15) * np.cos(columns / 31) for t in range(9)]
    video = np.repeat(np.stack(frames)[..., None], 3, axis=-1)
    noisy = video + np.random.default_rng(0).normal(0, 25, video.shape)
    for name, pixels in (("clean", video), ("noisy", noisy)):
        write_lossless(folder / f"{name}.mkv", pixels.clip(0, 255).astype(np.uint8), 8)
    return folder


def test_the_bundled_ffmpeg_has_libvmaf():
    assert has_libvmaf()


def test_identical_clips_score_97_and_more(clips):
    assert min(vmaf(clips / "clean.mkv", clips / "clean.mkv")) >= 97


def test_noise_costs_vmaf(clips):
    found, same = vmaf(clips / "clean.mkv", clips / "noisy.mkv"), vmaf(clips / "clean.mkv", clips / "clean.mkv")
    assert found.vmaf < same.vmaf - 5
    assert found.vmaf_neg <= found.vmaf + 1e-6


def test_a_file_that_is_no_video_is_an_error_that_names_it(clips, tmp_path):
    (tmp_path / "broken.mkv").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"broken\.mkv"):
        vmaf(clips / "clean.mkv", tmp_path / "broken.mkv")


@pytest.mark.parametrize(("height", "width"), [(17, 40), (40, 17), (16, 40), (40, 16)])
def test_vmaf_is_measured_exactly_where_libvmaf_can(height, width, tmp_path):
    file = tmp_path / "small.mkv"
    write_lossless(file, np.random.default_rng(0).integers(0, 255, (2, height, width, 3), dtype=np.uint8), 8)
    if min(height, width) < module.SMALLEST:
        assert module.TOO_SMALL in notes(height, width)
        assert not any("vmaf" in measure.names for measure in measures(False, height, width))
        with pytest.raises(ModelError, match="needs 17 pixels a side"):
            vmaf(file, file)
    else:
        assert any("vmaf" in measure.names for measure in measures(False, height, width))
        assert vmaf(file, file).vmaf > 90


def test_an_ffmpeg_without_libvmaf_is_noticed(monkeypatch):
    monkeypatch.setattr(module.imageio_ffmpeg, "get_ffmpeg_exe", lambda: "true")
    has_libvmaf.cache_clear()
    try:
        assert not has_libvmaf()
    finally:
        has_libvmaf.cache_clear()
