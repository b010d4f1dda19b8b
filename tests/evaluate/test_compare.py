import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tempoquant.calibrate.sample import CalibrationSample, RecordedCall
from tempoquant.errors import CalibrationError, ModelError
from tempoquant.evaluate import compare as module
from tempoquant.evaluate.compare import Task, compare
from tempoquant.models.family import ModelFamily, PipelineIndex
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.wan.family import COMPONENTS, WAN
from tempoquant.prompts import Prompt, provenance
from tempoquant.timesteps import TimestepBins
from tempoquant.tiny.sets import evaluation_items
from tests.recorded import SOURCE

ITEMS = evaluation_items(3)
PROMPTS = [Prompt(item.id, item.image, item.prompt) for item in ITEMS]
SETTINGS = SamplingSettings(64, 64, 17, 2, 3.5, 5.0, 8)


@dataclass(frozen=True, eq=False)
class FakeSource:
    """The part of a SourceModel that `compare` itself uses."""

    folder: Path
    weight_bytes: int = 200
    bits_per_weight: float = 16.0
    family: ModelFamily = WAN
    index: PipelineIndex = SOURCE.index
    loras: dict[str, Any] = field(default_factory=dict, compare=False)
    text_components: tuple[str, ...] = ()


REFERENCE, MODEL, BINNED = (FakeSource(Path(name)) for name in ("reference", "model", "binned"))


class FakePipelines:
    """Pipelines that are sources: each draws the scene with an error of its own and predicts with
    another.
    """

    def __init__(self) -> None:
        self.errors = {REFERENCE: 0.0, MODEL: 0.1}
        self.calls: list[tuple[FakeSource, str, int]] = []
        self.modes: list[str] = []
        self.modes_removed: list[FakeSource] = []

    def loaded(self, source, mode):
        self.modes.append(mode)
        return source

    def generate_video(self, pipeline, prompt, settings, seed, negative_prompt="", on_step=None):
        from tempoquant.tiny.world import render

        self.calls.append((pipeline, prompt.id, seed))
        for _ in range(settings.num_steps):
            on_step()
        item = next((item for item in ITEMS if item.id == prompt.id), ITEMS[0])
        video = render(item.scene).astype(float)
        return np.clip(video * (1 - self.errors[pipeline] / 10), 0, 255).astype(np.uint8)

    def record_trajectory(self, pipeline, prompt, settings, seed, on_step=None):
        for _ in range(settings.num_steps):
            on_step()
        prediction = torch.arange(1.0, 9.0)
        return [
            RecordedCall(CalibrationSample(prompt.id, denoiser, timestep, 0, "conditional", {}), prediction)
            for denoiser, timestep in (("high_noise", 950.0), ("low_noise", 300.0))
        ]

    def predict_noise(self, pipeline, sample):
        return torch.arange(1.0, 9.0) * (1 + self.errors[pipeline])


@pytest.fixture
def fake(monkeypatch):
    pipelines = FakePipelines()
    monkeypatch.setattr(module, "load_in_mode", lambda source, mode, device: pipelines.loaded(source, mode))
    monkeypatch.setattr(module, "remove_memory_mode", pipelines.modes_removed.append)
    monkeypatch.setattr(module, "configs_of", lambda folder: {})
    monkeypatch.setattr(module, "calibration_prompts_of", lambda folder: [])
    monkeypatch.setattr(module, "sampling_steps", lambda *_: [])
    for name in ("generate_video", "record_trajectory", "predict_noise"):
        monkeypatch.setattr(module, name, getattr(pipelines, name))
    return pipelines


def task(**changes: object) -> Task:
    return Task(**{"prompts": PROMPTS, "settings": SETTINGS, "seed": 5, "num_trajectories": 2, **changes})


def test_every_pipeline_is_loaded_in_one_memory_mode_which_is_taken_off_again(fake):
    compare(REFERENCE, {"model": MODEL}, task(), memory="lean")
    assert fake.modes == ["lean", "lean"]
    assert fake.modes_removed == [REFERENCE, MODEL]


def test_both_sides_get_the_same_prompts_and_seeds(fake):
    compare(REFERENCE, {"model": MODEL}, task())
    sides = [[(id, seed) for source, id, seed in fake.calls if source == side] for side in (REFERENCE, MODEL)]
    assert sides[0] == sides[1] == [(prompt.id, 5 + index) for index, prompt in enumerate(PROMPTS)]


def test_errors_are_those_of_the_model(fake):
    [model] = compare(REFERENCE, {"model": MODEL}, task()).comparison.models
    for denoiser in COMPONENTS:
        assert model.denoiser_sqnr_db(denoiser).mean == pytest.approx(20.0, abs=1e-3)
        assert model.denoiser_sqnr_db(denoiser).num_values == 2
    assert 30 < model.psnr_db.mean < 50
    assert model.psnr_db.num_values == 3


def test_a_reference_compared_with_itself_is_identical(fake):
    [model] = compare(REFERENCE, {"same": REFERENCE}, task()).comparison.models
    assert model.psnr_db.mean == model.denoiser_sqnr_db("low_noise").mean == math.inf
    assert model.ssim.mean == pytest.approx(1.0)


def test_the_reference_itself_has_no_distance(fake):
    reference = compare(REFERENCE, {}, task()).comparison.reference
    assert reference.psnr_db is reference.ssim is None
    assert reference.bits_per_weight == 16


def test_adherence_is_measured_in_the_bundled_world_only(fake):
    inside = compare(REFERENCE, {"model": MODEL}, task(in_bundled_world=True)).comparison
    outside = compare(REFERENCE, {"model": MODEL}, task()).comparison
    for result in (inside.reference, *inside.models):
        assert result.motion_followed.mean == result.appearance_kept.mean == 1.0
    for result in (outside.reference, *outside.models):
        assert result.motion_followed is result.appearance_kept is None


def test_a_prompt_of_another_world_has_no_adherence(fake):
    stranger = Prompt("cat", PROMPTS[0].image, "a cat walks along a wall")
    evidence = compare(REFERENCE, {"model": MODEL}, task(prompts=[stranger, *PROMPTS[1:]], in_bundled_world=True))
    [model] = evidence.comparison.models
    assert [video.motion_followed for video in model.videos] == [None, True, True]
    assert model.motion_followed.num_values == 2


def test_prompts_that_were_calibrated_on_are_refused_before_any_work(fake, monkeypatch):
    monkeypatch.setattr(
        module, "calibration_prompts_of", lambda folder: provenance(PROMPTS[:1]) if folder == MODEL.folder else []
    )
    with pytest.raises(CalibrationError, match="were calibrated on"):
        compare(REFERENCE, {"model": MODEL}, task())
    assert fake.calls == []


def test_a_model_that_predicts_nan_is_named(fake):
    fake.errors[MODEL] = math.nan
    with pytest.raises(ModelError, match=r"^model: high_noise at timestep 950"):
        compare(REFERENCE, {"model": MODEL}, task())


def test_all_models_are_measured_on_the_finest_bins(fake, monkeypatch):
    """A model that was quantized without bins would otherwise have nothing to be compared with."""
    fake.errors[BINNED] = 0.2
    config = SimpleNamespace(bins=TimestepBins((200.0, 400.0)), layers={}, notes=())
    configs = {BINNED.folder: {"low_noise": config}}
    monkeypatch.setattr(module, "configs_of", lambda folder: configs.get(folder, {}))
    models = compare(REFERENCE, {"model": MODEL, "binned": BINNED}, task()).comparison.models
    for model in models:
        assert [(e.denoiser, e.bin_index) for e in model.noise_prediction] == [
            ("high_noise", None),
            ("low_noise", None),
            ("low_noise", 1),
        ]


def test_progress_reaches_its_total_in_every_phase(fake):
    class Counting:
        def __init__(self):
            self.tasks = {}

        def start(self, description, total, done=0):
            self.tasks[description] = [total, 0]

            def advance():
                self.tasks[description][1] += 1

            return advance

    progress = Counting()
    compare(REFERENCE, {"model": MODEL}, task(), progress=progress)
    assert len(progress.tasks) == 6
    assert all(total == done for total, done in progress.tasks.values())


def test_no_prompts_are_an_error():
    with pytest.raises(CalibrationError):
        Task([], SETTINGS)


def test_the_videos_come_with_the_numbers(fake):
    evidence = compare(REFERENCE, {"model": MODEL}, task())
    assert list(evidence.videos) == ["16-bit", "model"]
    assert all(len(videos) == len(PROMPTS) for videos in evidence.videos.values())
    assert evidence.comparison.prompts == {prompt.id: prompt.text for prompt in PROMPTS}
    assert isinstance(PROMPTS[0].image, Image.Image)
