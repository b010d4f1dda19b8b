"""docs/checkpoint.md is right: its numpy reader decodes what TempoQuant writes, and it mentions
every key.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tempoquant.checkpoint.tensors import KEYS
from tempoquant.formats import FORMATS, INT4, MXFP4, unpack
from tests.checkpoint.test_schema import CONFIG, ENTRY
from tests.quantized_wan import write_component
from tests.random_layers import by_bin, random_layer

DOCUMENT = (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text(encoding="utf-8")


def read_weight(folder: Path, name: str, *timestep_bin: int) -> np.ndarray:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read_weight"](folder, name, *timestep_bin)


class Model(nn.Module):
    """Two linears, and what the writer of a component asks a model for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(128, 64), nn.Linear(64, 128, bias=False)

    def to_json_string(self) -> str:
        return "{}"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize(("rank", "deflated"), [(4, True), (4, False), (0, False)])
def test_the_documents_reader_decodes_every_format(
    tmp_path: Path, format: str, rank: int, deflated: bool, smoothed: bool
) -> None:
    model = Model()
    layers = {
        name: random_layer(getattr(model, name), format, rank=rank, smoothed=smoothed, deflated=deflated)
        for name in ("a", "b")
    }
    folder = write_component(tmp_path / "c", model, layers)
    for name, layer in layers.items():
        found = torch.from_numpy(read_weight(folder, name))
        assert found.dtype == torch.float32
        if rank:  # two libraries may sum up · down in different orders
            torch.testing.assert_close(found, layer.dequantize(), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found, layer.dequantize())


def test_the_documents_reader_decodes_the_weight_of_each_timestep_bin(tmp_path: Path) -> None:
    model = Model()
    layers = {name: by_bin(random_layer(getattr(model, name), "int4")) for name in ("a", "b")}
    folder = write_component(tmp_path / "c", model, layers)
    for name, layer in layers.items():
        for timestep_bin in range(3):
            found = torch.from_numpy(read_weight(folder, name, timestep_bin))
            torch.testing.assert_close(found, layer.dequantize(timestep_bin), rtol=1e-5, atol=1e-5)


def test_the_documents_table_of_nibbles_is_the_packing() -> None:
    rows = {
        line.split("|")[1].split(" ")[1]: line
        for line in DOCUMENT.splitlines()
        if re.match(r"\| (mxfp4|int4).*\| 0 \|", line)
    }
    for row, format in (("mxfp4,", MXFP4), ("int4", INT4)):
        levels = [float(cell.replace("−", "-")) for cell in rows[row].split("|")[2:-1]]
        codes = unpack(torch.arange(16, dtype=torch.uint8).reshape(1, -1), format)[0, ::2].tolist()
        meant = [(-1 if code < 0 else 1) * format.levels[min(abs(code), 7)] for code in codes]
        assert [x for i, x in enumerate(levels) if i != 8] == [x for i, x in enumerate(meant) if i != 8]


@pytest.mark.parametrize("key", [*CONFIG.to_dict(), *ENTRY.to_dict(), "prompts", "settings", "id", "image_sha256"])
def test_every_key_of_the_config_is_documented(key: str) -> None:
    assert f"`{key}`" in DOCUMENT


@pytest.mark.parametrize("key", KEYS)
def test_every_tensor_is_documented(key: str) -> None:
    assert f"`NAME.{key}`" in DOCUMENT
