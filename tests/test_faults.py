"""Failures of the machine in the middle: one clear sentence, nothing lost, and the same call
resumes.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import tempoquant
from tempoquant import Recipe
from tempoquant.engines import Local
from tempoquant.errors import CalibrationError, OutputError
from tests.kill_and_resume import all_bytes

QUICK = Recipe.load("paper").replace(num_prompts=1, num_steps=4, rank=2, height=32, width=32, num_frames=5)


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """Make a separate file system of that size."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tempoquant", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return all_bytes(tempoquant.quantize("tiny", tmp_path_factory.mktemp("undisturbed") / "out", QUICK, device="cpu"))


def test_a_disk_too_small_is_found_before_any_work(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        with pytest.raises(OutputError, match=r"needs .* GiB more and its disk has 0\.0 GiB free"):
            tempoquant.quantize("tiny", disk / "out", QUICK, device="cpu")
        assert not any(file.suffix == ".safetensors" for file in disk.rglob("*"))


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    monkeypatch.setattr("tempoquant.quantizing.run.check_disk", lambda *_: None)  # somebody else fills the disk
    with small_disk(tmp_path / "disk", 1) as disk:
        sizes = range(2, 40, 4)
        failures = []
        for mib in sizes:
            remount(disk, f"size={mib}m")
            try:
                result = tempoquant.quantize("tiny", disk / "out", QUICK, device="cpu")
                break
            except OutputError as error:
                failures.append(str(error))
        assert len(failures) > 2 and all("No space left" in words for words in failures)
        assert all("\n" not in words and words.endswith(".") for words in failures)
        assert all_bytes(result) == undisturbed


def test_a_disk_that_cannot_be_written_is_one_sentence(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with small_disk(tmp_path / "disk", 100) as disk:
        remount(disk, "ro")
        with pytest.raises(OutputError, match="Read-only file system"):
            tempoquant.quantize("tiny", disk / "out", QUICK, device="cpu")
        remount(disk, "rw")
        assert all_bytes(tempoquant.quantize("tiny", disk / "out", QUICK, device="cpu")) == undisturbed


def test_an_output_that_is_a_mount_point_is_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 100) as disk, pytest.raises(OutputError, match="is a mount point"):
        tempoquant.quantize("tiny", disk, QUICK, device="cpu")


def test_a_spoiled_sample_is_named_and_what_was_finished_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    from tests.test_quantize import interrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("tempoquant.quantizing.pipeline.Quantizing", interrupt)
        tempoquant.quantize("tiny", tmp_path / "out", QUICK, device="cpu")
    store = tmp_path / "out.unfinished" / "store"
    file = sorted((store / "samples").glob("*.safetensors"))[-1]
    tensors = load_file(file)
    tensors["hidden_states"][..., 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CalibrationError, match=file.name):
        tempoquant.quantize("tiny", tmp_path / "out", QUICK, device="cpu")


def test_a_store_of_another_model_is_refused(tmp_path: Path) -> None:
    from tempoquant.models.fingerprint import fingerprint
    from tempoquant.models.sampling_file import default_settings
    from tempoquant.recording.plan import ModelIdentity, RecordingPlan
    from tempoquant.recording.record import record
    from tests.recorded import SOURCE
    from tests.test_quantize import held_out

    settings = default_settings(SOURCE).replace(height=32, width=32, num_frames=5, num_steps=4)
    plan = RecordingPlan([held_out()], settings, 2)
    record(SOURCE, tmp_path / "store", plan, model=ModelIdentity("0" * 64), engine=Local(("cpu",)))
    assert fingerprint(SOURCE) != "0" * 64
    with pytest.raises(CalibrationError, match="recorded from another model"):
        tempoquant.quantize("tiny", tmp_path / "out", QUICK.replace(num_steps=None, num_frames=None),
                            store=tmp_path / "store")  # fmt: skip
