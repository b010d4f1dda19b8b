"""The inputs of prompts are compared with a model's needs before anything is recorded, and are part
of the provenance.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tempoquant.errors import CalibrationError, ModelError
from tempoquant.evaluate.compare import Task, compare
from tempoquant.models.clips import read_frames
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.source import SourceModel
from tempoquant.prompts import Prompt, load_prompts
from tempoquant.quantizing import quantize
from tempoquant.recipe import Recipe
from tempoquant.recording import record as recording
from tempoquant.recording.plan import RecordingPlan
from tempoquant.recording.record import record
from tests.conditioned import write_prompts
from tests.recorded import CPU, MODEL
from tests.wan_pipelines import write

DEFAULT = Recipe.load("default").replace(rank=4, num_prompts=3, samples_per_denoiser=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, SourceModel]:
    folder = tmp_path_factory.mktemp("models")
    names = ("wan21_t2v", "wan21_i2v", "vace", "animate")
    return {name: SourceModel.open(write(folder / name, name)) for name in names}


def plan_of(source: SourceModel, prompts: list[Prompt], **changes: bool) -> RecordingPlan:
    return RecordingPlan(prompts, default_settings(source), 2, **changes)


@pytest.mark.parametrize(
    ("model", "brings", "words"),
    [
        ("wan21_i2v", (), "a WanImageToVideoPipeline needs an image, which prompt 'prompt-0' lacks"),
        ("animate", ("image", "face"), "a WanAnimatePipeline needs a pose clip, which prompt 'prompt-0' lacks"),
    ],
)
def test_what_a_model_needs_is_asked_for_before_any_work(models, tmp_path, monkeypatch, model, brings, words):
    monkeypatch.setattr(recording, "record_into", lambda *_args, **_named: pytest.fail("something was recorded"))
    source, file = models[model], write_prompts(tmp_path, brings)
    prompts = load_prompts(file)
    with pytest.raises(CalibrationError, match=words):
        record(source, tmp_path / "store", plan_of(source, prompts), model=MODEL, engine=CPU)
    with pytest.raises(CalibrationError, match=words):
        quantize(source.folder, tmp_path / "quantized", DEFAULT, calibration=file)
    monkeypatch.setattr("tempoquant.evaluate.compare.load_in_mode", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(CalibrationError, match=words):
        compare(source, {"again": source}, Task(prompts, default_settings(source)), "cpu")
    assert sorted(path.suffix for path in tmp_path.glob("[sq]*")) == []


@pytest.mark.parametrize("model", ["wan21_t2v", "vace"])
def test_a_text_is_enough_for_text_to_video_and_for_vace(models, tmp_path, model):
    source, prompts = models[model], load_prompts(write_prompts(tmp_path, ()))[:1]
    store = record(source, tmp_path / "store", plan_of(source, prompts), model=MODEL, engine=CPU)
    assert store.prompts == [{"id": "prompt-0", "prompt": "a cat", "image_sha256": ""}]
    assert len(store.samples("transformer")) == 2


def test_a_clip_without_an_image_begins_with_its_own(models, tmp_path):
    source, clip = models["wan21_i2v"], tmp_path / "clip"
    clip.mkdir()
    for index in range(5):
        Image.new("RGB", (48, 48), (60 * index, 10, 200)).save(clip / f"{index}.png")
    first = read_frames("a", clip, 1, (32, 32))[0]
    samples = []
    for number, image in enumerate((None, first)):
        plan = plan_of(source, [Prompt("a", image, "x", clip)], from_latents=True)
        store = record(source, tmp_path / f"store-{number}", plan, model=MODEL, engine=CPU)
        samples.append(store.samples("transformer"))
    for alone, given in zip(*samples, strict=True):
        assert alone.inputs.keys() == given.inputs.keys()
        assert all(torch.equal(tensor, given.inputs[name]) for name, tensor in alone.inputs.items())


def test_neither_clip_nor_image_leaves_nothing_to_encode(models, tmp_path):
    source = models["wan21_t2v"]
    plan = plan_of(source, [Prompt("bare", None, "x")], from_latents=True)
    with pytest.raises(CalibrationError, match="prompt 'bare' has neither a video nor an image"):
        record(source, tmp_path / "store", plan, model=MODEL, engine=CPU)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["vace", "animate"])
def test_what_clips_alone_do_not_condition_is_refused_before_any_work(models, tmp_path, model):
    plan = plan_of(models[model], [Prompt("a", Image.new("RGB", (8, 8)), "x")], from_latents=True)
    with pytest.raises(ModelError, match="cannot be calibrated on clips alone"):
        record(models[model], tmp_path / "store", plan, model=MODEL, engine=CPU)
    assert list(tmp_path.iterdir()) == []


def test_the_clips_that_samples_depend_on_are_in_their_provenance(models, tmp_path):
    source = models["animate"]
    prompts = load_prompts(write_prompts(tmp_path, ("image", "pose", "face")))[:1]
    store = record(source, tmp_path / "store", plan_of(source, prompts), model=MODEL, engine=CPU)
    videos = store.provenance["videos"]
    assert list(videos) == ["prompt-0, face", "prompt-0, pose"]
    changed_frame = Path(prompts[0].clips["pose"]) / "4.png"
    Image.new("RGB", (64, 48), "white").save(changed_frame)
    changed = record(source, tmp_path / "other", plan_of(source, prompts), model=MODEL, engine=CPU)
    assert changed.provenance["videos"]["prompt-0, pose"] != videos["prompt-0, pose"]
    from_disk = record(source, tmp_path / "disk", plan_of(source, prompts), model=MODEL, engine=CPU, memory="disk")
    assert from_disk.digest == changed.digest
    inputs = changed.samples("transformer")[0].inputs
    assert not torch.equal(inputs["pose_hidden_states"], store.samples("transformer")[0].inputs["pose_hidden_states"])
    assert inputs["face_pixel_values"].shape == (1, 3, 5, 16, 16)
