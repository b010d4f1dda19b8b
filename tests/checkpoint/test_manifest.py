"""Laws of the manifest."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tempoquant.checkpoint.manifest import MANIFEST_NAME, read_manifest, verify_manifest, write_manifest
from tempoquant.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("[]")
    write_manifest(tmp_path, {"seed": 3})
    return tmp_path


def test_every_file_is_listed_and_verifies(folder: Path) -> None:
    assert verify_manifest(folder) == ["model_index.json", "vae/config.json"]
    assert read_manifest(folder).run == {"seed": 3}


def test_one_changed_byte_is_found(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{ }")
    with pytest.raises(CheckpointError, match=r"vae.config\.json is not the file that was written"):
        verify_manifest(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae.config\.json is missing"):
        verify_manifest(folder)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        verify_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["sha256"].update({"../outside": "0" * 64}),
        lambda m: m["sha256"].update({"/etc/passwd": "0" * 64}),
        lambda m: m["sha256"].update({"vae/../../x": "0" * 64}),
        lambda m: m["sha256"].update({"model_index.json": "nonsense"}),
        lambda m: m["sha256"].update({"model_index.json": 5}),
        lambda m: m.update(run=[]),
        lambda m: m.update(sha256=None),
        lambda m: m.update(extra=1),
        lambda m: m.pop("run"),
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    record = json.loads((folder / MANIFEST_NAME).read_text())
    change(record)
    (folder / MANIFEST_NAME).write_text(json.dumps(record))
    with pytest.raises(CheckpointError):
        verify_manifest(folder)
