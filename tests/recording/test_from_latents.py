"""Laws of samples from latents: of the form of recorded ones, as noisy as their timestep says, and
no denoiser runs.
"""

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

from tempoquant.errors import CalibrationError
from tempoquant.evaluate.files import write_mp4
from tempoquant.models import weights as denoiser_weights
from tempoquant.models.clips import clip_hash, read_clip
from tempoquant.models.schedule import sampling_steps
from tempoquant.prompts import Prompt
from tempoquant.recording.record import record
from tests.recorded import CPU, MODEL, PROMPTS, SETTINGS, SOURCE, plan, position, samples_of

NUM_LATENTS = 16


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return all samples of one prompt, recorded and from latents."""
    folder = tmp_path_factory.mktemp("both")
    return [
        samples_of(record(SOURCE, folder / str(kind), plan(1, 100, from_latents=kind), model=MODEL, engine=CPU))
        for kind in (False, True)
    ]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Make nine frames of one colour each, as a folder and as files."""
    folder = tmp_path_factory.mktemp("clips")
    frames = [Image.new("RGB", (64, 32), (20 * i, 10, 200)) for i in range(9)]
    (folder / "frames").mkdir()
    for index, frame in enumerate(frames):
        frame.save(folder / "frames" / f"{index:03d}.png")
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:])
    write_mp4(folder / "clip.mp4", np.stack([np.asarray(frame) for frame in frames]), 8)
    return folder


def test_samples_from_latents_have_the_form_of_recorded_ones(both):
    for recorded, noised in zip(*both, strict=True):
        assert (position(recorded), recorded.denoiser, recorded.timestep) == (
            position(noised), noised.denoiser, noised.timestep,
        )  # fmt: skip
        assert recorded.inputs.keys() == noised.inputs.keys()
        for key, tensor in recorded.inputs.items():
            assert (tensor.shape, tensor.dtype) == (noised.inputs[key].shape, noised.inputs[key].dtype)


def test_the_first_frame_the_text_and_the_pure_noise_are_those_of_the_recording(both):
    for recorded, noised in zip(*both, strict=True):
        for key in ("timestep", "encoder_hidden_states"):
            torch.testing.assert_close(recorded.inputs[key], noised.inputs[key])
        was, now = (sample.inputs["hidden_states"] for sample in (recorded, noised))
        torch.testing.assert_close(was[:, NUM_LATENTS:], now[:, NUM_LATENTS:])
        if recorded.step_index == 0:  # sigma is 1 but for 1e-6
            torch.testing.assert_close(was, now, rtol=1e-4, atol=1e-4)


def test_a_sample_holds_as_much_of_the_clip_as_its_timestep_says(both):
    """Latents of one prompt lie on a line from noise to clip: two of them give both, the others
    must agree.
    """
    steps = sampling_steps(SOURCE, SETTINGS)
    latents = {s.step_index: s.inputs["hidden_states"][:, :NUM_LATENTS] for s in both[1]}
    first, last = steps[0].sigma, steps[3].sigma
    clean = (first * latents[3] - last * latents[0]) / (first - last)
    noise = (latents[0] - (1 - first) * clean) / first
    for index in (1, 2):
        sigma = steps[index].sigma
        torch.testing.assert_close(latents[index], (1 - sigma) * clean + sigma * noise, rtol=1e-4, atol=1e-4)
    # The autoencoder is causal: the clip's first latent frame is that of its first image, which is
    # also the condition.
    first_frame = both[1][0].inputs["hidden_states"][:, NUM_LATENTS + 4 :, 0]
    torch.testing.assert_close(clean[:, :, 0], first_frame, rtol=1e-3, atol=1e-3)
    assert abs(float(noise.std()) - 1) < 0.1
    assert float(torch.corrcoef(torch.stack([clean.flatten(), noise.flatten()]))[0, 1]) < 0.2


def test_no_expert_is_loaded(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a denoiser was loaded")

    monkeypatch.setattr(denoiser_weights.DenoiserWeights, "__init__", refuse)
    monkeypatch.setattr(WanTransformer3DModel, "__init__", refuse)
    record(SOURCE, tmp_path / "store", plan(1, 1, from_latents=True), model=MODEL, engine=CPU)


def test_a_clip_changes_the_latents_and_is_in_the_provenance(colours, tmp_path):
    prompt = Prompt("a", PROMPTS[0].image, "go", colours / "frames")
    moving = record(SOURCE, tmp_path / "a", plan(prompts=[prompt], from_latents=True), model=MODEL, engine=CPU)
    still = plan(prompts=[Prompt("a", prompt.image, "go")], from_latents=True)
    standing = record(SOURCE, tmp_path / "b", still, model=MODEL, engine=CPU)
    assert moving.provenance["videos"] == {"a": clip_hash(colours / "frames")}
    assert standing.provenance["videos"] == {}
    last = [samples_of(store)[-1].inputs["hidden_states"] for store in (moving, standing)]
    assert float((last[0] - last[1])[:, :NUM_LATENTS].abs().max()) > 0.1
    assert torch.equal(last[0][:, NUM_LATENTS:], last[1][:, NUM_LATENTS:])


@pytest.mark.parametrize("name", ["frames", "clip.gif", "clip.mp4"])
def test_a_clip_is_read_in_order_and_cropped(colours, name):
    frames = read_clip(Prompt("a", PROMPTS[0].image, "go", colours / name), SETTINGS)
    assert [frame.size for frame in frames] == [(32, 32)] * 5
    reds = [int(np.asarray(frame)[16, 16, 0]) for frame in frames]
    assert reds == pytest.approx([0, 20, 40, 60, 80], abs=8)  # a gif has a palette, an mp4 losses


def test_an_image_without_a_clip_stands_still():
    frames = read_clip(PROMPTS[0], SETTINGS)
    assert len(frames) == 5 and len({frame.tobytes() for frame in frames}) == 1


def test_a_short_clip_is_named(colours):
    prompt = Prompt("a", PROMPTS[0].image, "go", colours / "frames")
    with pytest.raises(CalibrationError, match=r"prompt 'a': .* has 9 frames, 13 are wanted"):
        read_clip(prompt, SETTINGS.replace(num_frames=13))


def test_a_file_that_is_no_video_is_one_sentence(tmp_path):
    (tmp_path / "clip.gif").write_bytes(b"no video at all")
    with pytest.raises(CalibrationError, match=r"clip\.gif cannot be read as a video"):
        read_clip(Prompt("a", PROMPTS[0].image, "go", tmp_path / "clip.gif"), SETTINGS)


def test_another_clip_has_another_hash(colours, tmp_path):
    (tmp_path / "0.png").write_bytes((colours / "frames" / "000.png").read_bytes())
    assert clip_hash(tmp_path) != clip_hash(colours / "frames")
    assert len(clip_hash(colours / "clip.gif")) == 64
