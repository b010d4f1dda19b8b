"""`doctor` says what dispatch will do, on this machine and on one with a GPU."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempoquant.formats import FORMATS
from tempoquant.kernels import dispatch
from tempoquant.kernels.counted import COUNTED_GPUS
from tests.cli.typed import run

COUNTED_NAMES = {
    (8, 0): "NVIDIA A100-SXM4-80GB",
    (8, 9): "NVIDIA GeForce RTX 4090",
    (9, 0): "NVIDIA H100 80GB HBM3",
    (12, 0): "NVIDIA GeForce RTX 5090",
}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without a GPU is told")


@without_gpu
def test_a_machine_without_a_gpu_is_told_so() -> None:
    record = json.loads(run("doctor", "--json").stdout)
    assert [device["device"] for device in record["devices"]] == ["cpu"]
    kernels = record["devices"][0]["kernels"]
    assert kernels.keys() == FORMATS.keys() and {each["backend"] for each in kernels.values()} == {"reference"}
    assert record["libraries"]["torch"] == torch.__version__.split("+")[0] or record["libraries"]["torch"]
    shown = " ".join(run("doctor").stdout.split())
    assert "plain PyTorch" in shown and "GPU kernels need an NVIDIA GPU" in shown
    assert "RTX 5090 (12.0)" in shown and "6.02 ×" in shown and "not measured" in shown
    attention = record["devices"][0]["attention"]
    assert {each["backend"] for each in attention["chosen"].values()} == {"native"} and "native" in attention[
        "installed"
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run `doctor --json` as on a machine with one GPU of a compute capability and a name."""
    find_spec: Any = dispatch.importlib.util.find_spec

    def record_of(major: int, minor: int, triton: str | None = "3.6.0", name: str | None = None) -> dict[str, Any]:
        properties = SimpleNamespace(
            name=name or COUNTED_NAMES.get((major, minor), "a GPU"), total_memory=80 * 2**30, major=major, minor=minor
        )
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(dispatch, "triton_version", lambda: triton)
        there = object() if triton else None
        monkeypatch.setattr(
            dispatch.importlib.util, "find_spec", lambda name: there if name == "triton" else find_spec(name)
        )
        dispatch._choose.cache_clear()
        found: dict[str, Any] = json.loads(run("doctor", "--json").stdout)
        return found

    yield record_of
    dispatch._choose.cache_clear()


@without_gpu
def test_a_hopper_gpu_gets_fp8_for_the_default_format(gpu: Callable[..., dict[str, Any]]) -> None:
    record = gpu(9, 0)
    first = record["devices"][0]
    assert (first["device"], first["memory_gib"], first["compute_capability"]) == ("cuda:0", 80, "9.0")
    backends = {name: kernels["backend"] for name, kernels in first["kernels"].items()}
    assert backends == {"nvfp4_m1": "fp8", "mxfp4": "fp8", "nvfp4": "bf16", "int4": "int8"}
    default = first["kernels"]["nvfp4_m1"]
    assert default["counted_speed"] > 1 and default["counted_for"] == "H100 SXM"
    assert "counted_speed" not in first["kernels"]["nvfp4"]
    assert any("the fastest format is nvfp4_m1" in sentence for sentence in record["advice"])
    shown = " ".join(run("doctor").stdout.split())
    assert "nvfp4_m1 (default)" in shown and "FP8 tensor cores" in shown and "1.51 ×" in shown
    fast = first["attention"]["chosen"]["fast"]
    assert "sage" not in fast["backend"], "Sage's kernel for Hopper breaks Wan"
    assert fast["backend"] == "_flash_3" or any("_flash_3" in each and "build" in each for each in fast["missing"])


@without_gpu
@pytest.mark.parametrize(
    ("capability", "triton", "backend", "words"),
    [
        ((12, 0), "3.6.0", "fp4", "the fastest format is nvfp4"),
        ((12, 0), "3.5.1", "fp8", "pip install 'triton>=3.6'"),
        ((8, 9), None, "reference", "pip install 'triton"),
        ((7, 5), "3.6.0", "reference", "compute capability 8.9, and this GPU has 7.5"),
        ((8, 0), "3.6.0", "bf16", "the fastest format is int4"),
    ],
)
def test_each_machine_is_told_what_it_runs_and_what_it_lacks(
    gpu: Callable[..., dict[str, Any]], capability: tuple[int, int], triton: str | None, backend: str, words: str
) -> None:
    record = gpu(*capability, triton)
    assert record["devices"][0]["kernels"]["nvfp4_m1"]["backend"] == backend
    assert any(words in sentence for sentence in record["advice"]), record["advice"]
    promised = any("the fastest format" in sentence for sentence in record["advice"])
    assert promised == words.startswith("the fastest"), "figures are of the kernels that run here"


@without_gpu
@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((12, 0), "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ((12, 0), "NVIDIA GeForce RTX 5080"),
        ((9, 0), "NVIDIA H100 PCIe"),
        ((9, 0), "NVIDIA GH200 480GB"),
        ((8, 9), "NVIDIA L40S"),
        ((8, 9), "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ((8, 6), "NVIDIA RTX A6000"),
        ((8, 6), "NVIDIA A10"),
        ((8, 0), "NVIDIA A100-PCIE-40GB"),
    ],
)
def test_a_card_that_was_not_counted_gets_no_figure_of_another_one(
    gpu: Callable[..., dict[str, Any]], capability: tuple[int, int], name: str
) -> None:
    record = gpu(*capability, name=name)
    for kernels in record["devices"][0]["kernels"].values():
        assert kernels["backend"] != "reference" and not {"counted_speed", "counted_for"} & kernels.keys()
    assert not any("fastest format" in sentence for sentence in record["advice"])
    table = run("doctor").stdout.split("Attention")[0]
    assert "not counted" in table and "×" not in table


@without_gpu
def test_a_driver_beside_a_pytorch_without_cuda_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert any("a build without CUDA" in each for each in json.loads(run("doctor", "--json").stdout)["advice"])


def test_counted_speeds_are_those_of_the_document() -> None:
    """The figures are those at 480 × 832 with activations of four bits."""
    document = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    row = r"^\| ([^|]+) \| (\w+), W4A4, \w+ products \| 32,760 \|[^|]*\|[^|]*\| \*\*([\d.]+)\*\*"
    rows = re.findall(row, document, re.MULTILINE)
    in_code = {(gpu.name, format): ratio for gpu in COUNTED_GPUS for format, ratio in gpu.ratios.items()}
    assert in_code == {(gpu, format): float(ratio) for gpu, format, ratio in rows}
