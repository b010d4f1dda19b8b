import numpy as np
import pytest
import torch

from tempoquant.evaluate.metrics.measures import CEILING_DB, Clip, measures, names_of, notes, take_measures
from tempoquant.tiny.sets import evaluation_items
from tempoquant.tiny.world import render

[ITEM] = evaluation_items(1)
LATENTS = {"high_noise bin 0": torch.arange(1.0, 9.0), "low_noise bin 0": torch.arange(2.0, 10.0)}


@pytest.fixture
def clip(tmp_path):
    from tempoquant.evaluate.files import write_lossless

    video = render(ITEM.scene)
    write_lossless(tmp_path / "a.mkv", video, 8)
    return Clip(ITEM.prompt, video, tmp_path / "a.mkv", LATENTS)


def test_a_clip_is_as_close_to_itself_as_can_be(clip):
    found = take_measures(measures(True, 64, 64), clip, clip)
    assert found["psnr_db"] == found["final_latent_db"] == CEILING_DB
    assert found["sqnr_db"] == dict.fromkeys(LATENTS, CEILING_DB)
    assert found["ssim"] == pytest.approx(1.0)
    assert found["motion_followed"] is found["appearance_kept"] is True


def test_the_reference_has_only_what_needs_no_reference(clip):
    which = measures(True, 64, 64)
    found = take_measures(which, clip, None)
    assert list(found) == names_of(which, is_reference=True)
    assert set(found) == {"temporal_flickering", "motion_followed", "appearance_kept"}
    assert set(take_measures(which, clip, clip)) == set(names_of(which, is_reference=False))


def test_latents_are_compared_bin_by_bin_and_the_last_bin_is_final(clip):
    other = Clip(clip.text, clip.video, clip.file, {"high_noise bin 0": 1.1 * LATENTS["high_noise bin 0"],
                                                     "low_noise bin 0": 1.01 * LATENTS["low_noise bin 0"]})  # fmt: skip
    found = take_measures(measures(False, 64, 64), other, clip)
    assert found["sqnr_db"] == {"high_noise bin 0": pytest.approx(20, abs=1e-3),
                                "low_noise bin 0": pytest.approx(40, abs=1e-2)}  # fmt: skip
    assert found["final_latent_db"] == found["sqnr_db"]["low_noise bin 0"]


@pytest.mark.parametrize(("text", "frames"), [("a cat walks", 17), (ITEM.prompt, 9)])
def test_adherence_is_not_judged_outside_the_bundled_world(clip, text, frames):
    other = Clip(text, np.ascontiguousarray(clip.video[:frames]), clip.file, LATENTS)
    found = take_measures(measures(True, 64, 64), other, None)
    assert found["motion_followed"] is found["appearance_kept"] is None


def test_vmaf_is_called_meaningless_where_it_is(monkeypatch):
    from tempoquant.evaluate.metrics import vmaf

    assert vmaf.SMALL in notes(64, 64) and vmaf.SMALL not in notes(480, 832)
    monkeypatch.setattr(vmaf, "has_libvmaf", lambda: False)
    assert vmaf.MISSING in notes(480, 832)
    assert "vmaf" not in names_of(measures(False, 480, 832), is_reference=False)
