"""`doctor` says what dispatch will do, on this machine and on one with a GPU."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempoquant.formats import FORMATS
from tempoquant.kernels import dispatch
from tests.cli.typed import run

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without a GPU is told")


@without_gpu
def test_a_machine_without_a_gpu_is_told_so() -> None:
    record = json.loads(run("doctor", "--json").stdout)
    assert [device["device"] for device in record["devices"]] == ["cpu"]
    kernels = record["devices"][0]["kernels"]
    assert kernels.keys() == FORMATS.keys() and {each["backend"] for each in kernels.values()} == {"reference"}
    assert record["libraries"]["torch"] == torch.__version__.split("+")[0] or record["libraries"]["torch"]
    shown = " ".join(run("doctor").stdout.split())
    assert "plain PyTorch" in shown and "needs an NVIDIA GPU" in shown
    attention = record["devices"][0]["attention"]
    assert {each["backend"] for each in attention["chosen"].values()} == {"native"} and "native" in attention[
        "installed"
    ]


@without_gpu
def test_a_hopper_gpu_gets_fp8_for_the_default_format(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="a Hopper", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    find_spec: Any = dispatch.importlib.util.find_spec
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name == "triton" or find_spec(name))
    dispatch._choose.cache_clear()
    try:
        record = json.loads(run("doctor", "--json").stdout)
    finally:
        dispatch._choose.cache_clear()
    gpu = record["devices"][0]
    assert (gpu["device"], gpu["name"], gpu["memory_gib"], gpu["compute_capability"]) == (
        "cuda:0",
        "a Hopper",
        80,
        "9.0",
    )
    backends = {name: kernels["backend"] for name, kernels in gpu["kernels"].items()}
    assert backends == {"nvfp4_m1": "fp8", "mxfp4": "fp8", "nvfp4": "bf16", "int4": "int8"}
    fast = gpu["attention"]["chosen"]["fast"]
    assert "sage" not in fast["backend"], "Sage's kernel for Hopper breaks Wan"
    assert fast["backend"] == "_flash_3" or any("_flash_3" in each and "build" in each for each in fast["missing"])
