"""Laws of what a generation is given, and of what it refuses."""

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
from tempoquant.hosts.diffusers import sampling
from tempoquant.hosts.diffusers.sampling import generate_video, use_flow_shift
from tempoquant.models.families import PipelineFacts
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.prompts import Prompt
from tests.recorded import SETTINGS, SOURCE


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


def taken_for_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every generating model one of its family, with a scheduler that is left unchanged."""
    facts = PipelineFacts(SOURCE.family, SOURCE.index, SOURCE.denoisers)
    monkeypatch.setattr(sampling, "facts_of", lambda _: facts)
    monkeypatch.setattr(sampling, "use_flow_shift", lambda *_: None)


def fake_pipeline(frames: np.ndarray, seen: dict[str, object]) -> object:
    def run(**arguments: object) -> SimpleNamespace:
        seen.update(arguments)
        return SimpleNamespace(frames=[frames])

    return run


def test_a_video_with_nan_is_an_error_and_not_black(monkeypatch: pytest.MonkeyPatch) -> None:
    taken_for_the_bundled_model(monkeypatch)
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
    taken_for_the_bundled_model(monkeypatch)
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
        generate_video(None, prompt, SETTINGS, seed)  # type: ignore[arg-type]
