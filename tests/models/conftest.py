"""Tiny random pipelines that several tests of sources read."""

import shutil
from pathlib import Path

import pytest

from tests.wan_pipelines import write

KINDS = ("wan22_t2v", "wan22_ti2v", "wan21_i2v", "vace")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of a pipeline with two experts."""
    return Path(shutil.copytree(folders["wan22_t2v"], tmp_path / "model"))
