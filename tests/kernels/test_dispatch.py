"""Laws of the choice of kernels: what a device can run, why, and no silence when it cannot."""

from typing import Any

import pytest
import torch

from tempoquant.errors import UnsupportedError
from tempoquant.formats import FORMATS, INT4, MXFP4, NVFP4, NVFP4_M1, Format
from tempoquant.kernels import dispatch
from tempoquant.kernels.dispatch import Backend, choose, forced

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that the GPU has a compute capability."""
    dispatch._choose.cache_clear()

    def pretend(major: int, minor: int) -> None:
        dispatch._choose.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())

    yield pretend
    dispatch._choose.cache_clear()


@pytest.mark.parametrize(
    ("capability", "format", "backend"),
    [
        ((9, 0), NVFP4_M1, Backend.FP8),
        ((8, 9), MXFP4, Backend.FP8),
        ((10, 0), NVFP4, Backend.FP4),
        ((10, 3), MXFP4, Backend.FP4),
        ((12, 0), NVFP4_M1, Backend.FP4),
        ((11, 0), NVFP4_M1, Backend.FP8),
        ((12, 0), INT4, Backend.INT8),
        ((9, 0), NVFP4, Backend.BF16),  # its scales are no FP8 numbers
        ((9, 0), INT4, Backend.INT8),
        ((8, 0), INT4, Backend.INT8),
        ((8, 6), MXFP4, Backend.BF16),
        ((7, 5), INT4, Backend.REFERENCE),
    ],
)
def test_each_gpu_gets_the_fastest_backend_it_has(gpu: Any, capability: Any, format: Format, backend: Backend) -> None:
    gpu(*capability)
    assert choose(GPU, format).backend is backend


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_cpu_runs_the_reference_and_is_told_why(format: Format) -> None:
    choice = choose(torch.device("cpu"), format)
    assert choice.backend is Backend.REFERENCE and "bf16: it needs an NVIDIA GPU" in choice.reason


def test_without_triton_the_reference_runs_and_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    choice = choose(GPU, MXFP4)
    assert choice.backend is Backend.REFERENCE
    assert "not fp4, fp8, bf16: Triton is not installed" in choice.reason


def test_a_triton_that_is_too_old_is_named(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.4.0")
    choice = choose(GPU, MXFP4)
    assert choice.backend is Backend.REFERENCE
    assert "it needs Triton 3.5 (torch 2.9 brings it), and 3.4.0 is installed" in choice.reason


def test_a_backend_can_be_forced_and_is_free_again_afterwards(gpu: Any) -> None:
    gpu(9, 0)
    with forced("bf16"):
        assert choose(GPU, MXFP4) == (Backend.BF16, "the user asked for it")
        with forced(Backend.REFERENCE):
            assert choose(GPU, MXFP4).backend is Backend.REFERENCE
        with forced(None):
            assert choose(GPU, MXFP4).backend is Backend.BF16
    assert choose(GPU, MXFP4).backend is Backend.FP8


@pytest.mark.parametrize(
    ("backend", "format", "why"),
    [
        ("fp4", INT4, "no E2M1 numbers"),
        ("fp8", NVFP4, "no FP8 numbers"),
        ("int8", MXFP4, "no integers"),
        ("fp8", MXFP4, "needs an NVIDIA GPU"),
    ],
)
def test_a_forced_backend_that_cannot_run_is_refused_with_the_reason(
    backend: str, format: Format, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with forced(backend), pytest.raises(UnsupportedError, match=f"'{backend}' was asked for, but .*{why}"):
        choose(torch.device("cpu"), format)


def test_an_unknown_backend_is_refused_by_name() -> None:
    with (
        pytest.raises(
            UnsupportedError, match="no backend called 'fp9'; known ones are fp4, fp8, int8, bf16, reference"
        ),
        forced("fp9"),
    ):
        pass


def test_levels_times_scales_of_fp8_exact_formats_are_fp8_numbers() -> None:
    """Every level with every scale of an octave of the grid, at both ends of the window."""
    octaves = {MXFP4.name: range(-8, 7), NVFP4_M1.name: range(-7, 6)}
    for format in FORMATS.values():
        if not format.is_fp8_exact:
            assert format in (NVFP4, INT4)
            continue
        mantissas = (1.0,) if format is MXFP4 else (1.0, 1.5)
        numbers = torch.tensor(
            [level * m * 2.0**e for level in format.levels for m in mantissas for e in octaves[format.name]]
        )
        assert torch.equal(numbers.to(torch.float8_e4m3fn).float(), numbers)
        assert format.scale_octaves is None or len(octaves[format.name]) == format.scale_octaves + 1
