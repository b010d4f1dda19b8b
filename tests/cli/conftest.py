"""Models small enough to be quick, and a quantize() that only remembers what it was asked."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tempoquant import quantizing
from tempoquant.recipe import Recipe
from tests.evaluate.quantized_folder import write_quantized_folder
from tests.quantized_wan import write_pipeline
from tests.recorded import TINY


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a quantized pipeline, complete."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the bundled model as a folder without its sampling."""

    def link_weights(source: str, target: str) -> None:
        (os.symlink if source.endswith(".safetensors") else shutil.copyfile)(source, target)

    folder = Path(shutil.copytree(TINY, tmp_path / "model", copy_function=link_weights))
    (folder / "sampling.json").unlink()
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized_folder(tmp_path_factory.mktemp("quantized") / "model")


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first.png")
    return tmp_path / "first.png"


@pytest.fixture
def quantize_calls(monkeypatch, quantized):
    """Record the calls of quantizing.quantize, which returns the module's quantized folder."""
    calls: list[tuple[str, Path, Recipe, dict[str, object]]] = []

    def fake(model, output, recipe, **arguments):
        del arguments["progress"]
        calls.append((model, output, recipe, arguments))
        return quantized

    monkeypatch.setattr(quantizing, "quantize", fake)
    return calls
