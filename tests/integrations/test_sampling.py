"""Laws of sampling settings, and of what a generation refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from tempoquant.errors import ModelError, SettingsError
from tempoquant.integrations import sampling
from tempoquant.integrations.sampling import SamplingSettings, default_settings, generate_video, use_flow_shift
from tempoquant.prompts import Prompt
from tempoquant.tiny import weights_folder


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 65}, {"width": 0}, {"height": "64"}, {"num_frames": 16}, {"num_frames": 0}, {"num_steps": 0},
        {"num_steps": 2.5}, {"fps": True}, {"guidance_scale": 0}, {"guidance_scale": float("nan")},
        {"flow_shift": -1.0}, {"flow_shift": float("inf")},
    ],
)  # fmt: skip
def test_settings_that_no_model_can_run_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        SamplingSettings(**wrong)  # type: ignore[arg-type]


def test_replacing_by_none_changes_nothing() -> None:
    assert SamplingSettings().replace(height=None, num_steps=3) == SamplingSettings(num_steps=3)


def test_a_folder_without_a_sampling_file_samples_as_wan22_was_published(tmp_path: Path) -> None:
    assert default_settings(tmp_path) == SamplingSettings(480, 832, 81, 40, 3.5, 5.0, 16)


def test_the_bundled_model_has_its_own_size_and_its_schedulers_flow_shift() -> None:
    settings = default_settings(weights_folder())
    assert (settings.height, settings.width, settings.num_frames) == (64, 64, 17)
    scheduler = json.loads((weights_folder() / "scheduler" / "scheduler_config.json").read_text())
    assert settings.flow_shift == scheduler["flow_shift"]


@pytest.mark.parametrize("text", ["{", "[]", '{"height": 65}', '{"no_such": 1}', '{"height": "x"}'])
def test_a_bad_sampling_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises(ModelError, match=r"sampling\.json is not a valid sampling file"):
        default_settings(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow_shift"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow_shift"),
        (FlowMatchEulerDiscreteScheduler(), "shift"),
    ],
    ids=["UniPC", "DPM", "Euler"],
)
def test_a_flow_shift_keeps_the_kind_of_scheduler(scheduler: object, key: str) -> None:
    pipeline = SimpleNamespace(scheduler=scheduler)
    use_flow_shift(pipeline, 7.0)
    assert type(pipeline.scheduler) is type(scheduler) and pipeline.scheduler.config[key] == 7.0
    same = pipeline.scheduler
    use_flow_shift(pipeline, None)
    assert pipeline.scheduler is same


def test_a_scheduler_without_a_flow_shift_is_refused() -> None:
    with pytest.raises(ModelError, match="DDIMScheduler has no flow shift"):
        use_flow_shift(SimpleNamespace(scheduler=DDIMScheduler()), 5.0)


def fake_pipeline(frames: np.ndarray, seen: dict[str, object]) -> object:
    def run(**arguments: object) -> SimpleNamespace:
        seen.update(arguments)
        return SimpleNamespace(frames=[frames])

    return run


def test_a_video_with_nan_is_an_error_and_not_black(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "use_flow_shift", lambda *_: None)
    frames = np.full((1, 4, 4, 3), 0.5)
    prompt = Prompt("a", Image.new("RGB", (300, 100), "red"), "go")
    seen: dict[str, object] = {}
    settings = SamplingSettings(32, 32, 1, 1, 1.0, None, 8)
    assert generate_video(fake_pipeline(frames, seen), prompt, settings, 0).max() == 128  # type: ignore[arg-type]
    assert seen["image"].size == (32, 32)  # type: ignore[attr-defined]
    frames[0, 1, 2, 0] = np.nan
    with pytest.raises(ModelError, match="video for 'a' holds NaN"):
        generate_video(fake_pipeline(frames, seen), prompt, settings, 0)  # type: ignore[arg-type]


def test_an_image_of_another_shape_is_cropped_and_not_squeezed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "use_flow_shift", lambda *_: None)
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))  # the middle third, a square
    seen: dict[str, object] = {}
    pipeline = fake_pipeline(np.zeros((1, 4, 4, 3)), seen)
    generate_video(pipeline, Prompt("a", image, "go"), SamplingSettings(32, 32, 1, 1, 1.0, None, 8), 0)  # type: ignore[arg-type]
    (_, most_red), _, (least_blue, _) = seen["image"].getextrema()  # type: ignore[attr-defined]
    assert most_red < 32 and least_blue > 223  # what the resampling filter lets in at the edges


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_one_sentence(seed: int) -> None:
    prompt = Prompt("a", Image.new("RGB", (32, 32)), "go")
    with pytest.raises(SettingsError, match="a seed lies in"):
        generate_video(None, prompt, SamplingSettings(), seed)  # type: ignore[arg-type]
