"""Laws of the file that is written a tensor at a time: it is what the library would have written,
or an error.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tempoquant.checkpoint.one_file import OneFileWriter
from tempoquant.checkpoint.tensors import StoredAs
from tempoquant.errors import CheckpointError, OutputError
from tests.random_layers import random

TENSORS = {
    "b.scale": random(3, 5).to(torch.float8_e4m3fn),
    "a": random(7, 3),
    "c.weight": random(5, 3, seed=1).to(torch.bfloat16),
    "number": torch.tensor(0.25),
    "none": torch.zeros(0, 4, dtype=torch.float16),
    "bytes": torch.arange(11, dtype=torch.uint8),
}
FORMS = {name: StoredAs(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_whatever_the_order_the_bytes_are_those_that_the_library_writes(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.safetensors"
    save_file(TENSORS, theirs, metadata={"format": "pt"})
    for i, names in enumerate((list(TENSORS), list(reversed(TENSORS)))):
        file = tmp_path / f"{i}.safetensors"
        with OneFileWriter(file, FORMS, {}) as writer:
            for name in names:
                writer.add(name, TENSORS[name])
        assert file.read_bytes() == theirs.read_bytes()


def test_what_is_added_comes_back_with_the_metadata(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with OneFileWriter(file, FORMS, {"tempoquant": "ü"}) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "tempoquant": "ü"}


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ([("a", torch.zeros(3))], r"a is torch\.float32 \[3\], but its config says torch\.float32 \[2\]"),
        ([("b", torch.zeros(2))], "tensor b is not one of the 1 announced"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "tensor a was added twice"),
        ([], "tensor a was announced and never added"),
    ],
)
def test_a_tensor_that_is_not_the_announced_one_is_refused(
    tmp_path: Path, added: list[tuple[str, torch.Tensor]], words: str
) -> None:
    writer = OneFileWriter(tmp_path / "x.safetensors", {"a": StoredAs(torch.float32, (2,))}, {})
    with pytest.raises(CheckpointError, match=words), writer:
        for name, tensor in added:
            writer.add(name, tensor)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"), OneFileWriter(tmp_path / "nowhere" / "x.safetensors", {}, {}):
        raise AssertionError("a file was opened in no folder")
