"""Laws of the sample store: what goes in comes out, interruptions leave no trace, and nothing
foreign is believed.
"""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tempoquant.calibrate.sample import CalibrationSample
from tempoquant.calibrate.store import SampleStore
from tempoquant.calibrate.store_index import StoreIndex
from tempoquant.calibrate.store_writer import StoreWriter
from tempoquant.errors import CalibrationError, OutputError
from tempoquant.models.wan.family import COMPONENTS

SCHEDULE = {"high_noise": [999.0, 937.5], "low_noise": [500.0]}
LOOP = [("high_noise", 999.0), ("high_noise", 937.5), ("low_noise", 500.0)]
PROVENANCE = {
    "model": {"hub_id": None, "revision": None, "fingerprint": "f" * 64},
    "scheduler": {"class": "UniPCMultistepScheduler", "flow_shift": 5.0},
    "settings": {"num_steps": 3},
    "seed": 0,
    "compute_dtype": "float32",
    "from_latents": False,
    "prompts": [{"id": f"p{i}", "prompt": "go", "image_sha256": "0" * 64} for i in range(2)],
    "videos": {},
    "loras": {},
}


def sample(prompt: int, step: int, branch: str = "conditional") -> CalibrationSample:
    generator = torch.Generator().manual_seed(100 * prompt + step)
    denoiser, timestep = LOOP[step]
    inputs = {
        "hidden_states": torch.randn(1, 36, 2, 4, 4, generator=generator).to(torch.bfloat16),
        "timestep": torch.tensor([timestep]),
        "encoder_hidden_states": torch.full((1, 5, 8), float(prompt) if branch == "conditional" else -1.0),
    }
    return CalibrationSample(f"p{prompt}", denoiser, timestep, step, branch, inputs)  # type: ignore[arg-type]


SAMPLES = {
    prompt: [sample(prompt, step, branch) for step in range(3) for branch in ("conditional", "unconditional")]
    for prompt in range(2)
}


def write(folder: Path, prompts: dict[int, list[CalibrationSample]] = SAMPLES) -> SampleStore:
    writer = StoreWriter(folder, {"encoder_hidden_states"})
    for index, samples in prompts.items():
        if writer.committed(index) is None:
            for each in samples:
                writer.add(index, each)
            writer.commit(index)
    return writer.finish(PROVENANCE, SCHEDULE, sorted(prompts))


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return write(tmp_path / "store")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def key_of(sample: CalibrationSample) -> tuple[object, ...]:
    return sample.step_index, sample.prompt_id, sample.guidance_branch


def test_what_was_recorded_is_read_back_bit_for_bit(store):
    wanted = {key_of(each): each for samples in SAMPLES.values() for each in samples}
    found = [each for denoiser in COMPONENTS for each in store.samples(denoiser)]
    assert len(found) == len(wanted)
    for each in found:
        original = wanted[key_of(each)]
        assert (each.denoiser, each.timestep) == (original.denoiser, original.timestep)
        assert set(each.inputs) == set(original.inputs)
        for key, tensor in each.inputs.items():
            assert tensor.dtype == original.inputs[key].dtype
            assert torch.equal(tensor, original.inputs[key])


def test_samples_come_by_step_then_prompt_then_branch(store):
    assert [key_of(each) for each in store.samples("high_noise")] == [
        (step, f"p{prompt}", branch)
        for step in (0, 1) for prompt in (0, 1) for branch in ("conditional", "unconditional")
    ]  # fmt: skip
    assert store.schedule("high_noise") == (999.0, 937.5)


def test_a_text_is_stored_once_however_many_calls_read_it(store):
    assert len(list((store.folder / "texts").iterdir())) == 3  # two prompts and the empty text
    assert len(list((store.folder / "samples").iterdir())) == 12


def test_a_sample_is_read_when_it_is_asked_for_and_not_before(store):
    samples = store.samples("low_noise")
    (store.folder / samples.entries[1].file).write_bytes(b"damaged")
    assert len(samples) == 4
    assert [each.prompt_id for each in samples[2:]] == ["p1", "p1"]
    assert samples[0].timestep == 500.0
    with pytest.raises(CalibrationError, match="SHA-256 differs"):
        samples[1]


def test_an_interrupted_recording_leaves_the_same_bytes(store, tmp_path):
    folder = tmp_path / "other"
    writer = StoreWriter(folder, {"encoder_hidden_states"})
    for each in SAMPLES[0]:
        writer.add(0, each)
    writer.commit(0)
    writer.add(1, SAMPLES[1][0])  # and here it ends
    (folder / "samples" / "0001-009-conditional.safetensors.partial").write_bytes(b"half")
    assert write(folder).digest == store.digest
    assert bytes_of(folder) == bytes_of(store.folder)


def test_a_prompt_whose_files_were_damaged_is_recorded_again(tmp_path):
    writer = StoreWriter(tmp_path, {"encoder_hidden_states"})
    writer.add(0, SAMPLES[0][0])
    writer.commit(0)
    assert [entry.step_index for entry in writer.committed(0)] == [0]
    [file] = (tmp_path / "samples").iterdir()
    file.write_bytes(b"")
    assert writer.committed(0) is None
    with pytest.raises(CalibrationError, match=r"prompt 0 .* is not recorded"):
        writer.finish(PROVENANCE, SCHEDULE, [0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_refused_before_it_is_stored(tmp_path, value):
    bad = sample(1, 1)
    bad.inputs["hidden_states"][0, 0, 0, 0, 0] = value
    with pytest.raises(CalibrationError, match=r"prompt 'p1' at timestep 937\.5: hidden_states holds NaN or Inf"):
        StoreWriter(tmp_path, set()).add(1, bad)


def test_a_stored_nan_names_file_prompt_and_timestep(store):
    entry = store.entries("low_noise")[0]
    file = store.folder / entry.file
    save_file({"hidden_states": torch.full((1, 2), torch.nan), "timestep": torch.tensor([500.0])}, file)
    change(store, lambda record: record["samples"][8].update(sha256=hashlib.sha256(file.read_bytes()).hexdigest()))
    with pytest.raises(CalibrationError, match=rf"{file.name}, prompt 'p0' at timestep 500: hidden_states holds NaN"):
        SampleStore.open(store.folder).samples("low_noise")[0]


def change(store: SampleStore, how) -> None:
    file = store.folder / "store.json"
    record = json.loads(file.read_text())
    how(record)
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda r: r.update(format_version=2), "format_version is 1, not 2"),
        (lambda r: r.pop("schedule"), "'schedule' is missing"),
        (lambda r: r.update(more=1), "'more' is an unknown key"),
        (lambda r: r["provenance"].pop("seed"), "'seed' is missing"),
        (lambda r: r["schedule"].update(high_noise=[1.0, 2.0]), "high_noise is a falling list"),
        (lambda r: r["samples"][0].update(file="../secret.safetensors"), "inside the store"),
        (lambda r: r["samples"][0].update(file="samples/../../x.safetensors"), "inside the store"),
        (lambda r: r["samples"][0].update(file="/etc/passwd"), "inside the store"),
        (lambda r: r["samples"][0].update(file="samples/none.safetensors"), "is missing"),
        (lambda r: r["samples"][0].update(texts="texts/none.safetensors"), "texts is a listed file"),
        (lambda r: r["samples"][0].update(expert="medium"), "expert is a denoiser of the schedule"),
        (lambda r: r["samples"][0].update(guidance_branch="both"), "guidance_branch is one of"),
        (lambda r: r["samples"][0].update(timestep=1e9), "timestep lies in"),
        (lambda r: r["samples"][0].update(timestep=998.0), "timestep is in the schedule of high_noise"),
        (lambda r: r["samples"][0].update(step_index=-1), "step_index is one of"),
        (lambda r: r["samples"][0].update(prompt_id="p9"), "prompt_id is one of the recorded prompts"),
        (lambda r: r["samples"].append(r["samples"][0]), "file is listed once"),
        (lambda r: r["samples"][0].update(sha256="0"), "a hash is 64 hexadecimal digits"),
        (lambda r: r.update(samples=[0] * 30_000), "samples is a list of at most"),
    ],
)
def test_a_store_that_nobody_would_write_is_refused(store, how, words):
    change(store, how)
    with pytest.raises(CalibrationError, match=words) as caught:
        SampleStore.open(store.folder)
    assert "record the samples again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_broken_index_is_one_sentence(store, text):
    (store.folder / "store.json").write_text(text)
    with pytest.raises(CalibrationError, match=r"store\.json"):
        SampleStore.open(store.folder)


def test_a_folder_without_an_index_is_no_store(tmp_path):
    with pytest.raises(CalibrationError, match=r"holds no store\.json: give the folder"):
        SampleStore.open(tmp_path)


def test_a_link_out_of_the_store_is_refused(store, tmp_path):
    file = store.folder / store.entries("low_noise")[0].file
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CalibrationError, match="leads out of its folder"):
        SampleStore.open(store.folder)


@pytest.mark.parametrize(
    "tensors",
    [
        {"hidden_states": torch.zeros(2, 3, 4)},
        {"hidden_states": torch.zeros(())},
        {"timestep": torch.zeros(1, 0)},
        {"hidden_states": torch.zeros(1, 3, dtype=torch.int8)},
        {"hidden_states": torch.zeros(1, 3), "timestep": torch.tensor([7.0])},
    ],
    ids=["batch", "no dimension", "empty", "dtype", "timestep"],
)
def test_tensors_that_are_no_inputs_of_one_call_are_refused(store, tensors):
    file = store.folder / store.entries("high_noise")[0].file
    save_file(tensors, file)
    change(store, lambda record: record["samples"][0].update(sha256=hashlib.sha256(file.read_bytes()).hexdigest()))
    with pytest.raises(CalibrationError, match=file.name):
        SampleStore.open(store.folder).samples("high_noise")[0]


def test_a_full_disk_is_one_sentence_and_finished_prompts_stay(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path, set())
    writer.add(0, SAMPLES[0][0])
    writer.commit(0)
    with monkeypatch.context() as patch:

        def full(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device.*free some space.*finished are kept"):
            writer.add(1, SAMPLES[1][0])
    assert StoreWriter(tmp_path, set()).committed(0) is not None


def test_the_index_is_the_same_text_after_reading_it(store):
    text = (store.folder / "store.json").read_text(encoding="utf-8")
    assert StoreIndex.from_dict(json.loads(text)).to_json() == text
    assert store.digest == hashlib.sha256(text.encode()).hexdigest()


def test_magnitude_ratios_are_the_mean_of_the_prompts_and_an_older_store_has_none(tmp_path):
    writer = StoreWriter(tmp_path / "store", {"encoder_hidden_states"})
    for prompt, ratio in ((0, 1.2), (1, 1.4)):
        for each in SAMPLES[prompt]:
            writer.add(prompt, each)
        writer.commit(prompt, {"high_noise": {"conditional": [1.0, ratio], "unconditional": [1.0, 0.5]}})
    store = writer.finish(PROVENANCE, SCHEDULE, [0, 1])
    found = store.magnitude_ratios("high_noise")
    assert found.timesteps == store.schedule("high_noise")
    assert found.by_branch["conditional"] == pytest.approx((1.0, 1.3))
    assert found.by_branch["unconditional"] == (1.0, 0.5)
    assert store.magnitude_ratios("low_noise") is None
    older = write(tmp_path / "older")
    assert older.magnitude_ratios("high_noise") is None
    index = json.loads((store.folder / "store.json").read_text())
    index["magnitude_ratios"]["high_noise"]["timesteps"] = [999.0, 900.0]
    with pytest.raises(CalibrationError, match="magnitude_ratios are of the first timesteps of high_noise"):
        StoreIndex.from_dict(index)
