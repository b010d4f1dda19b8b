"""Two experts from two slots, and what there is to choose from."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tempoquant.errors import ModelError
from tempoquant.hosts.comfyui.experts import open_experts
from tempoquant.hosts.comfyui.export import export
from tempoquant.hosts.comfyui.listing import list_models
from tests.quantized_wan import write_pipeline


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("comfyui") / "quantized", "int4")


@pytest.fixture(scope="module")
def files(quantized: Path) -> tuple[Path, Path]:
    out = export(quantized, quantized.with_name("exported"))
    return out / "high_noise.safetensors", out / "low_noise.safetensors"


def test_a_folder_in_both_slots_gives_both_and_files_give_themselves(quantized: Path, files: tuple[Path, Path]) -> None:
    for slots in ((quantized, quantized), files, (files[0], quantized), (quantized, files[1])):
        assert [each.name for each in open_experts(*slots)] == ["high_noise", "low_noise"]


def test_a_file_in_the_others_slot_is_loaded_with_a_warning(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    high, low = files
    with caplog.at_level(logging.WARNING):
        open_experts(high, low)
        assert caplog.messages == []
        assert [each.name for each in open_experts(low, high)] == ["low_noise", "high_noise"]
        open_experts(low, low)
    assert "exchange them" in caplog.messages[0] and "both slots hold the low_noise expert" in caplog.messages[1]


def test_experts_of_different_models_are_refused_by_what_differs(quantized: Path, tmp_path: Path) -> None:
    other = shutil.copytree(quantized, tmp_path / "other")
    config = other / "transformer_2/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 16}))
    with pytest.raises(ModelError, match=r"different models \(in_channels is 36 in one and 16 in the other\)"):
        open_experts(quantized, other)


def test_models_are_listed_from_folders_and_links_and_nothing_else_is(
    quantized: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "wan").mkdir(parents=True)
    second.mkdir()
    (first / "wan/high.safetensors").symlink_to(files[0])
    (first / "linked").symlink_to(quantized)
    shutil.copytree(quantized / "transformer", second / "alone")
    save_file({"x": torch.zeros(1)}, first / "stock.safetensors")
    (first / "broken.safetensors").write_bytes(b"no header")
    (first / "circle").symlink_to(first)
    (second / "16-bit").mkdir()
    (second / "16-bit/model_index.json").write_text("{}")
    found = list_models([first, second, tmp_path / "nowhere"])
    assert [*found] == ["alone", "linked", "wan/high.safetensors"]
    assert found["alone"] == second / "alone"
