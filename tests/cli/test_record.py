"""`record` as a user types it."""

import json

import pytest
from PIL import Image

from tempoquant.calibrate.store import SampleStore
from tempoquant.engines import Local
from tempoquant.recording import record as recording
from tests.cli.typed import assert_refused, run, split
from tests.recorded import write_lora

SMALL = split("--prompts 2 --samples-per-denoiser 3 --steps 4 --frames 5 --size 32x32 --device cpu")


@pytest.fixture
def plans(monkeypatch):
    """Record the plans of `record`, which records nothing."""
    found = []

    def fake(source, folder, plan, **arguments):
        found.append((plan, arguments))
        raise recording.OutputError("nothing is recorded here.")

    monkeypatch.setattr(recording, "record", fake)
    return found


def test_record_says_what_it_wrote_and_then_that_it_is_there(tmp_path):
    first = run("record", "tiny", "-o", tmp_path / "store", *SMALL)
    assert first.exit_code == 0, first.output
    words = "written: samples 3 of high_noise at 2 of its 2 timesteps and 3 of low_noise at 2 of its 2 timesteps"
    assert words in " ".join(first.stdout.split())
    record = json.loads(run("record", "tiny", "-o", tmp_path / "store", *SMALL, "--json").stdout)
    assert record["existed"] is True
    assert record["digest"] == SampleStore.open(tmp_path / "store").digest
    assert record["denoisers"]["low_noise"] == {"num_prompts": 2, "num_samples": 3, "num_timesteps": 2}
    assert_refused(run("record", "tiny", "-o", tmp_path / "store", *SMALL, "--seed", 1), 1, "different seed")
    again = run("record", "tiny", "-o", tmp_path / "store", *SMALL, *split("--seed 1 --overwrite --memory disk"))
    assert "written" in again.stdout


def test_record_from_latents_needs_no_flag_but_its_own(tmp_path):
    Image.new("RGB", (48, 32), "red").save(tmp_path / "first.png")
    (tmp_path / "frames").mkdir()
    for index in range(5):
        Image.new("RGB", (48, 32), (50 * index, 0, 0)).save(tmp_path / "frames" / f"{index}.png")
    line = {"id": "a", "image": "first.png", "prompt": "a red square", "video": "frames"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    flags = [*SMALL, "--from-latents", "--calibration", tmp_path / "p.jsonl", "--prompts", 1]
    result = run("record", "tiny", "-o", tmp_path / "store", *flags)
    assert result.exit_code == 0, result.output
    store = SampleStore.open(tmp_path / "store")
    assert store.provenance["from_latents"] and set(store.provenance["videos"]) == {"a"}


def test_flags_become_the_plan(plans, tmp_path):
    flags = split("--guidance-scale 4 --flow-shift 3 --seed 7 --memory disk --overwrite")
    run("record", "tiny", "-o", tmp_path / "store", *SMALL, *flags)
    [(plan, arguments)] = plans
    settings = plan.settings
    assert (settings.height, settings.num_frames, settings.num_steps) == (32, 5, 4)
    assert (settings.guidance_scale, settings.flow_shift) == (4.0, 3.0)
    assert (plan.samples_per_denoiser, plan.seed, len(plan.prompts), plan.from_latents) == (3, 7, 2, False)
    assert (arguments["memory"], arguments["overwrite"], arguments["engine"]) == ("disk", True, Local(("cpu",)))
    assert len(arguments["model"].fingerprint) == 64 and arguments["model"].hub_id is None


def test_a_lora_of_four_steps_brings_them_and_says_so(plans, tmp_path):
    file = write_lora(tmp_path / "lora_4steps.safetensors", 0.1)
    result = run("record", "tiny", "-o", tmp_path / "store", "--lora", f"low_noise={file}", "--flow-shift", 4)
    [(plan, _)] = plans
    assert (plan.settings.num_steps, plan.settings.guidance_scale, plan.settings.flow_shift) == (4, 1.0, 4.0)
    assert set(plan.loras) == {"low_noise"}
    assert "sampling with num_steps 4, guidance_scale 1, flow_shift 4." in result.stderr


def test_another_lora_leaves_the_sampler_and_says_so(plans, tmp_path):
    file = write_lora(tmp_path / "style.safetensors", 0.1)
    result = run("record", "tiny", "-o", tmp_path / "store", "--lora", f"low_noise={file}:0.5")
    [(plan, _)] = plans
    assert (plan.settings.num_steps, plan.settings.guidance_scale) == (20, 2.5)
    assert [lora.strength for lora in plan.loras["low_noise"].loras] == [0.5]
    assert "sampling with the model's own steps and guidance" in " ".join(result.stderr.split())


def test_twelve_prompts_are_the_default(plans, tmp_path):
    run("record", "tiny", "-o", tmp_path / "store")
    assert len(plans[0][0].prompts) == 12


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--lora x", 2, "'x' is not DENOISER=FILE"),
        ("--lora high_noise=missing", 2, "there is no LoRA file missing"),
        ("--memory lean", 2, "Invalid value for '--memory'"),
        ("--memory swap --device cpu", 1, "there is no GPU here: choose resident or disk"),
        ("--size 33x32", 1, "height is a multiple of 16, not 33"),
        ("--prompts 0", 2, "Invalid value for '--prompts'"),
        ("--calibration missing.jsonl", 1, "there is no prompt file or folder missing.jsonl"),
        ("--steps 1 --prompts 1", 1, "belongs to low_noise"),
    ],
)
def test_record_refuses_bad_flags_before_any_work(tmp_path, monkeypatch, flags, code, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(run("record", "tiny", "-o", tmp_path / "store", *split(flags)), code, words)
    assert list(tmp_path.iterdir()) == []


def test_a_lora_for_a_denoiser_that_is_not_there_is_refused(tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", 0.1)
    result = run("record", "tiny", "-o", tmp_path / "store", "--lora", f"sideways={file}")
    assert_refused(result, 1, "a LoRA belongs to high_noise or low_noise, not 'sideways'")


def test_one_lora_twice_for_one_expert_is_refused(tmp_path):
    file = write_lora(tmp_path / "lora.safetensors", 0.1)
    both = ["--lora", f"high_noise={file}", "--lora", f"high_noise={file}:0.5"]
    assert_refused(run("record", "tiny", "-o", tmp_path / "store", *both), 1, "is given twice for high_noise")
