"""Laws of sampling settings, and of where a pipeline's own come from."""

import json
import shutil
from pathlib import Path

import pytest

from tempoquant.errors import ModelError, SettingsError
from tempoquant.models.sampling_file import default_settings
from tempoquant.models.sampling_settings import SamplingSettings
from tempoquant.models.source import SourceModel
from tests.recorded import SETTINGS, SOURCE, TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the bundled model without its sampling."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "sampling.json").unlink()
    return folder


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 0}, {"width": 0}, {"height": "64"}, {"num_frames": 0}, {"num_steps": 0}, {"num_steps": 2.5},
        {"fps": True}, {"guidance_scale": -1}, {"guidance_scale": float("nan")}, {"flow_shift": -1.0},
        {"flow_shift": float("inf")},
    ],
)  # fmt: skip
def test_settings_that_no_model_can_run_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        SETTINGS.replace(**wrong)


@pytest.mark.parametrize("wrong", [{"height": 65}, {"width": 40}, {"num_frames": 16}])
def test_settings_that_a_model_cannot_run_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        SOURCE.geometry.require(SETTINGS.replace(**wrong))


def test_replacing_by_none_changes_nothing() -> None:
    assert SETTINGS.replace(height=None, num_steps=3) == SamplingSettings(32, 32, 5, 3, 2.5, 5.0, 8)


def test_a_folder_without_a_sampling_file_samples_as_wan22_was_published(folder: Path) -> None:
    assert default_settings(SourceModel.open(folder)) == SamplingSettings(480, 832, 81, 40, 3.5, 5.0, 16)


def test_the_bundled_model_has_its_own_size_and_its_schedulers_flow_shift() -> None:
    settings = default_settings(SOURCE)
    assert (settings.height, settings.width, settings.num_frames) == (64, 64, 17)
    scheduler = json.loads((TINY / "scheduler" / "scheduler_config.json").read_text())
    assert settings.flow_shift == scheduler["flow_shift"]


@pytest.mark.parametrize("text", ["{", "[]", '{"height": 65}', '{"no_such": 1}', '{"height": "x"}'])
def test_a_bad_sampling_file_is_named(folder: Path, text: str) -> None:
    (folder / "sampling.json").write_text(text)
    with pytest.raises(ModelError, match=r"sampling\.json is not a valid sampling file"):
        default_settings(SourceModel.open(folder))
