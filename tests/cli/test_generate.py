import json

import numpy as np
import pytest
from diffusers import DDIMScheduler

from tempoquant.hosts.diffusers import sampling
from tempoquant.models import schedule
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.placement import memory_modes
from tests.cli.typed import assert_refused, run, split

modes: list[tuple[object, ...]] = []


@pytest.fixture
def generate_calls(monkeypatch):
    """Record the calls of generate_video."""
    calls = []
    modes.clear()

    def fake(pipeline, prompt, settings, seed, negative_prompt, on_step):
        calls.append((prompt, settings, seed, negative_prompt))
        for _ in range(settings.num_steps):
            on_step()
        return np.zeros((settings.num_frames, 64, 64, 3), np.uint8)

    monkeypatch.setattr(memory_modes, "load_in_mode", lambda *args: modes.append(args))
    monkeypatch.setattr(sampling, "generate_video", fake)
    monkeypatch.setattr(schedule, "sampling_steps", lambda *_: [])
    return calls


def test_generate_writes_a_video_with_the_settings_that_were_given(generate_calls, model, tmp_path, image):
    flags = split(
        "--steps 2 --frames 5 --size 64x48 --seed 7 --guidance-scale 1.5 --flow-shift 3 --negative-prompt fog"
    )
    result = run("generate", model, "--image", image, "--prompt", "go", "-o", tmp_path / "a.mp4", *flags)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert "5 frames of 64×64, 2 steps, seed 7" in result.stdout
    [(prompt, settings, seed, negative_prompt)] = generate_calls
    assert (prompt.text, seed, negative_prompt) == ("go", 7, "fog")
    assert settings == SamplingSettings(64, 48, 5, 2, 1.5, 3.0, settings.fps)


@pytest.mark.parametrize(
    ("flags", "mode", "in_chunks", "why"),
    [
        ((), "resident", True, "in chunks of tokens: on a CPU"),
        (("--memory", "lean"), "lean", True, "in chunks of tokens: on a CPU"),
        (("--in-one-piece",), "resident", False, "in one piece: the user asked for it"),
        (("--in-chunks", "--memory", "lean"), "lean", True, "in chunks of tokens: the user asked for it"),
    ],
)
def test_generate_loads_the_model_in_the_memory_mode_and_says_how_its_blocks_compute(
    generate_calls, model, tmp_path, image, flags, mode, in_chunks, why
):
    result = run("generate", model, "--image", image, "--prompt", "go", "-o", tmp_path / "a.mp4", "--device", "cpu",
                 "--steps", 1, "--frames", 1, *flags)  # fmt: skip
    assert [(source.folder, *others) for source, *others in modes] == [(model, mode, "cpu", in_chunks)]
    assert len(generate_calls) == 1
    assert f"Blocks compute {why}" in result.stderr and f"Blocks computed {why}" in " ".join(result.stdout.split())


def test_generate_takes_what_is_not_given_from_the_model(generate_calls, model, tmp_path, image):
    own = SamplingSettings(32, 32, 9, 3, 2.0, 4.0, 6)
    (model / "sampling.json").write_text(json.dumps(own.__dict__))
    run("generate", model, "--image", image, "--prompt", "go", "-o", tmp_path / "a.mp4", "--steps", 4)
    assert generate_calls[0][1] == own.replace(num_steps=4)


def test_generate_says_when_it_falls_back_on_the_published_settings(generate_calls, model, tmp_path, image, caplog):
    run("generate", model, "--image", image, "--prompt", "go", "-o", tmp_path / "a.mp4", "--frames", 1)
    [line] = caplog.messages
    assert "has no sampling.json, so height 480, width 832, num_steps 40" in line and "num_frames" not in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--speed fast", "MagCache needs magnitude ratios, which a recording measures, and high_noise has none"),
        ("--compile --memory lean", "--compile and --memory lean cannot be combined"),
        ("--compile", "--compile needs blocks that compute all tokens in one piece"),
        ("--compile --in-one-piece --cache taylorseer", "--compile and --cache taylorseer cannot be combined"),
        ("--attention sage", "attention backend sage needs a CUDA GPU"),
        ("--attention nothing", "diffusers has no attention backend 'nothing'"),
    ],
)
def test_generate_refuses_what_cannot_be_combined_before_it_loads(generate_calls, model, tmp_path, image, flags, words):
    result = run("generate", model, "--image", image, "--prompt", "go", "-o", tmp_path / "a.mp4", "--device", "cpu",
                 *split(flags))  # fmt: skip
    assert_refused(result, 1, words)
    assert modes == [] and generate_calls == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--image": "missing.png"}, "there is no image"),
        ({"-o": "missing/a.mp4"}, "there is no folder"),
        ({"-o": "a.gif"}, "does not end in .mp4"),
        ({"--size": "40x64"}, "is a multiple of 16"),
    ],
)
def test_generate_refuses_bad_input(generate_calls, model, tmp_path, image, changes, words):
    options = {"--image": image, "--prompt": "go", "-o": "a.mp4", **changes}
    options |= {key: tmp_path / options[key] for key in ("--image", "-o")}
    flags = [each for pair in options.items() for each in pair]
    assert_refused(run("generate", model, *flags), 1, words)
    assert not list(tmp_path.rglob("*.mp4"))


def test_generate_refuses_a_scheduler_without_a_flow_shift_before_a_model_is_loaded(
    monkeypatch, model, tmp_path, image
):
    monkeypatch.setattr(memory_modes, "load_in_mode", lambda *_: pytest.fail("a model was loaded"))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    DDIMScheduler().save_pretrained(model / "scheduler")
    arguments = ["--image", image, "--prompt", "go", "-o", tmp_path / "a.mp4", "--flow-shift", 3]
    assert_refused(run("generate", model, *arguments), 1, "the pipeline's DDIMScheduler has no flow shift")


def test_generate_without_a_prompt_is_a_usage_error(model, tmp_path, image):
    assert_refused(run("generate", model, "--image", image, "-o", tmp_path / "a.mp4"), 2, "Missing option '--prompt'")
