"""A small model computes on one thread, unless somebody chose otherwise; afterwards there are as
many as before.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tempoquant.models.component_files import Component
from tempoquant.models.source import SourceModel
from tempoquant.placement.cpu_threads import suited_threads
from tests.recorded import SOURCE


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model_of(folder: Path, heads: int, width: int) -> SourceModel:
    """Return the bundled model with another width in its config."""
    config = {"num_attention_heads": heads, "attention_head_dim": width}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    transformer = Component(folder, "diffusers", "WanTransformer3DModel")
    return dataclasses.replace(SOURCE, components={**SOURCE.components, "transformer": transformer})


@pytest.mark.parametrize(
    ("heads", "device", "chosen", "threads"),
    [(4, "cpu", None, 1), (40, "cpu", None, 2), (4, "cuda", None, 2), (4, "cpu", "2", 2)],
    ids=["small", "large", "on a GPU", "chosen by the user"],
)
def test_threads_suit_the_model(two_threads, tmp_path, monkeypatch, heads, device, chosen, threads) -> None:
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    with suited_threads(model_of(tmp_path, heads, 128), device):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_after_an_error_there_are_as_many_threads_as_before(two_threads, tmp_path) -> None:
    with pytest.raises(RuntimeError), suited_threads(model_of(tmp_path, 4, 64), "cpu"):
        raise RuntimeError
    assert torch.get_num_threads() == 2
