"""Laws of recording: the calls that are kept are those a generation makes, and stopping it changes
nothing.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tempoquant.calibrate.store_writer import StoreWriter
from tempoquant.engines import Local
from tempoquant.errors import CalibrationError, OutputError, SettingsError
from tempoquant.hosts.diffusers.pipeline import load_pipeline
from tempoquant.hosts.diffusers.sampling import record_trajectory
from tempoquant.models.lora.lora import Lora, LoraSum
from tempoquant.models.wan.family import COMPONENTS, WAN
from tempoquant.models.wan.pipelines import I2V_A14B
from tempoquant.output.work_folder import SUFFIX
from tempoquant.recipe import Recipe
from tempoquant.recording import record as recording
from tempoquant.recording import stages as recording_stages
from tempoquant.recording.plan import CALIBRATION_NOISE, default_samples_per_denoiser, resolve_recipe, stored_settings
from tempoquant.recording.record import record, record_into
from tests.recorded import (
    CPU,
    MODEL,
    PROMPTS,
    SETTINGS,
    SOURCE,
    TINY,
    Counting,
    bytes_of,
    plan,
    position,
    samples_of,
    write_lora,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return record(SOURCE, tmp_path_factory.mktemp("recorded") / "store", plan(), model=MODEL, engine=CPU)


def test_the_calls_kept_are_those_of_the_pipelines_own_generation(store):
    pipeline = load_pipeline(SOURCE, "cpu")
    calls = {}
    for index, prompt in enumerate(PROMPTS[:2]):
        for call in record_trajectory(pipeline, prompt, SETTINGS, CALIBRATION_NOISE + index):
            calls[position(call.sample)] = call.sample
    kept = samples_of(store)
    assert len(calls) == 16 and len(kept) == 12
    for sample in kept:
        original = calls[position(sample)]
        assert (sample.denoiser, sample.timestep) == (original.denoiser, original.timestep)
        assert sample.inputs.keys() == original.inputs.keys()
        for key, tensor in original.inputs.items():
            # Weights that are mapped from a file are aligned otherwise than copies, which changes
            # the last bits.
            torch.testing.assert_close(sample.inputs[key], tensor, rtol=1e-3, atol=1e-3)


def test_two_workers_record_what_one_records(store, tmp_path):
    progress = Counting()
    several = record(SOURCE, tmp_path / "store", plan(), model=MODEL, engine=Local(("cpu", "cpu")), progress=progress)
    assert several.prompts == store.prompts and len(samples_of(several)) == len(samples_of(store))
    for sample, wanted in zip(samples_of(several), samples_of(store), strict=True):
        assert position(sample) == position(wanted)
        for key, tensor in wanted.inputs.items():  # another number of threads, another order of summation
            torch.testing.assert_close(sample.inputs[key], tensor, rtol=1e-3, atol=1e-3)
    assert sorted(path.name for path in several.folder.iterdir()) == sorted(p.name for p in store.folder.iterdir())


def test_the_store_says_where_its_samples_come_from(store):
    assert [prompt["id"] for prompt in store.prompts] == [prompt.id for prompt in PROMPTS[:2]]
    assert stored_settings(store) == SETTINGS
    assert store.provenance["model"] == {"fingerprint": "f" * 64, "hub_id": None, "revision": None}
    assert store.provenance["scheduler"] == {"class": "UniPCMultistepScheduler", "flow_shift": 5.0}
    assert {denoiser: store.schedule(denoiser) for denoiser in COMPONENTS} == {
        "high_noise": (999.0, 937.0), "low_noise": (833.0, 625.0),
    }  # fmt: skip


def test_calibration_sees_no_noise_of_a_small_seed(store):
    """Seeds that differ may give one noise: torch reads the lowest 32 bits of them."""
    noise = samples_of(store)[0].inputs["hidden_states"][:, :16]
    for seed in range(10):
        other = torch.randn(noise.shape, generator=torch.Generator("cpu").manual_seed(seed))
        assert float((noise - other).abs().max()) > 1


@pytest.mark.parametrize("settings", [{"colour": 1}, {"height": "tall"}, {"num_steps": -1}])
def test_settings_that_no_recording_has_are_refused(store, settings):
    strange = SimpleNamespace(folder=store.folder, settings=settings)
    with pytest.raises(CalibrationError, match="has settings that no recording has"):
        stored_settings(strange)


def test_lean_records_what_resident_records(store, tmp_path):
    from_disk = record(SOURCE, tmp_path / "disk", plan(), model=MODEL, engine=CPU, memory="disk")
    assert from_disk.provenance == store.provenance
    for expected, found in zip(samples_of(store), samples_of(from_disk), strict=True):
        assert position(expected) == position(found)
        for key, tensor in expected.inputs.items():
            torch.testing.assert_close(found.inputs[key], tensor)


def test_a_recording_that_was_killed_goes_on_at_the_next_prompt_and_leaves_the_same_bytes(store, tmp_path, monkeypatch):
    target = tmp_path / "store"

    def killed(self, prompt_index, magnitude_ratios=None):
        if prompt_index == 1:
            raise KeyboardInterrupt

        commit(self, prompt_index, magnitude_ratios)

    commit = StoreWriter.commit
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "commit", killed)
        record(SOURCE, target, plan(), model=MODEL, engine=CPU)
    assert not target.exists()
    progress = Counting()
    continued = record(SOURCE, target, plan(), model=MODEL, engine=CPU, progress=progress)
    assert progress.tasks["Recording calibration samples"] == [8, 8]
    assert bytes_of(continued.folder) == bytes_of(store.folder)
    assert not target.with_name("store" + SUFFIX).exists()


def test_a_finished_store_is_left_as_it_is(store, monkeypatch):
    monkeypatch.setattr(recording_stages, "loaded_pipeline", None)
    assert record(SOURCE, store.folder, plan(), model=MODEL, engine=CPU).digest == store.digest
    assert record_into(SOURCE, store.folder, plan(), model=MODEL, device="cpu").digest == store.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "different seed"),
        ({"settings": SETTINGS.replace(flow_shift=4.0)}, "different scheduler and settings"),
        ({"prompts": PROMPTS[1:3]}, "different prompts"),
        ({"samples_per_denoiser": 5}, "different samples_per_denoiser"),
        ({"from_latents": True}, "different from_latents"),
    ],
)
def test_another_recordings_store_is_refused_and_the_difference_named(store, changes, words):
    before = bytes_of(store.folder)
    with pytest.raises(OutputError, match=f"{words}.*--overwrite"):
        record(SOURCE, store.folder, plan(**changes), model=MODEL, engine=CPU)
    assert bytes_of(store.folder) == before


def test_overwrite_replaces_another_store(store, tmp_path):
    shutil.copytree(store.folder, tmp_path / "store")
    changed = plan(1, 1)
    replaced = record(SOURCE, tmp_path / "store", changed, model=MODEL, engine=CPU, overwrite=True)
    assert len(samples_of(replaced)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["file", "folder"])
def test_what_is_no_store_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("")
    with pytest.raises(OutputError, match=r"is a file|holds no store\.json"):
        record(SOURCE, tmp_path / name, plan(), model=MODEL, engine=CPU)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "mine.txt"]


def test_a_store_inside_the_model_is_refused():
    with pytest.raises(OutputError, match="overlap"):
        record(SOURCE, TINY / "store", plan(), model=MODEL, engine=CPU)


def test_only_steps_and_prompts_that_are_wanted_are_sampled(tmp_path):
    progress = Counting()
    # One call of each denoiser, of its second step: the third step of the loop is the last one
    # needed.
    found = record(SOURCE, tmp_path / "store", plan(2, 1), model=MODEL, engine=CPU, progress=progress)
    steps = [sample.step_index for sample in samples_of(found)]
    assert {sample.prompt_id for sample in samples_of(found)} == {PROMPTS[0].id}
    assert progress.tasks["Recording calibration samples"] == [max(steps) + 1] * 2


def test_samples_without_guidance_are_all_conditional(tmp_path):
    unguided = plan(1, 100, settings=SETTINGS.replace(guidance_scale=1.0))
    found = samples_of(record(SOURCE, tmp_path / "store", unguided, model=MODEL, engine=CPU))
    assert [sample.guidance_branch for sample in found] == ["conditional"] * 4  # all there are


def test_a_lora_changes_what_comes_after_its_first_step(store, tmp_path):
    lora = Lora.load(write_lora(tmp_path / "lora.safetensors", 1.0), WAN)
    found = record(SOURCE, tmp_path / "store", plan(loras={"high_noise": LoraSum((lora,))}), model=MODEL, engine=CPU)
    assert found.provenance["loras"] == {"high_noise": lora.sha256}
    for before, after in zip(samples_of(store), samples_of(found), strict=True):
        same = torch.equal(before.inputs["hidden_states"], after.inputs["hidden_states"])
        assert same == (before.step_index == 0)


def test_a_disk_without_room_is_noticed_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    monkeypatch.setattr(recording_stages, "loaded_pipeline", None)
    with pytest.raises(OutputError, match=r"12 samples need 0\.0 GiB and the disk of .* has 0\.0 GiB free"):
        record(SOURCE, tmp_path / "store", plan(), model=MODEL, engine=CPU)


def test_an_expert_without_a_step_is_named_before_any_work(tmp_path):
    with pytest.raises(CalibrationError, match=r"none of 1 steps .* belongs to low_noise: calibrate with more steps"):
        record(SOURCE, tmp_path / "store", plan(settings=SETTINGS.replace(num_steps=1)), model=MODEL, engine=CPU)
    assert list(tmp_path.iterdir()) == []


def test_swapping_on_the_cpu_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="there is no GPU here"):
        record(SOURCE, tmp_path / "store", plan(), model=MODEL, engine=CPU, memory="swap")


def test_a_plan_of_nothing_cannot_be_made():
    with pytest.raises(CalibrationError, match="nothing to record"):
        plan(0)
    with pytest.raises(CalibrationError, match="nothing to record"):
        plan(samples_per_denoiser=0)


def test_a_million_tokens_are_recorded_where_nobody_says():
    geometry = SOURCE.geometry
    assert default_samples_per_denoiser(I2V_A14B, geometry) == 33  # 32,760 tokens each
    assert default_samples_per_denoiser(I2V_A14B.replace(height=720, width=1280), geometry) == 32
    assert default_samples_per_denoiser(SETTINGS, geometry) == 2**20 // 8


def test_a_resolved_recipe_leaves_nothing_of_sampling_to_the_model():
    geometry = SOURCE.geometry
    recipe = resolve_recipe(Recipe("a", smoothing_alpha=0.5, num_steps=7), SETTINGS, geometry)
    assert (recipe.num_steps, recipe.guidance_scale, recipe.flow_shift, recipe.height) == (7, 2.5, 5.0, 32)
    assert recipe.samples_per_denoiser == 2**20 // 8
    assert resolve_recipe(recipe, I2V_A14B, geometry) == recipe
    assert resolve_recipe(Recipe("rtn"), SETTINGS, geometry) == Recipe("rtn")


def test_an_input_that_is_not_finite_names_prompt_and_timestep(tmp_path, monkeypatch):
    original = recording_stages.sample_of

    def broken(prompt, position, inputs):
        sample = original(prompt, position, inputs)
        sample.inputs["hidden_states"][:] = torch.nan
        return sample

    monkeypatch.setattr(recording_stages, "sample_of", broken)
    with pytest.raises(CalibrationError, match=f"prompt '{PROMPTS[0].id}' at timestep 999: hidden_states holds NaN"):
        record(SOURCE, tmp_path / "store", plan(1, 8), model=MODEL, engine=CPU)
    assert not (Path(tmp_path) / "store").exists()
