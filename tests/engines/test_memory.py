"""Telling a GPU that is gone from one that is full."""

import pytest
import torch

from tempoquant.device import is_device_lost, selected


class AcceleratorError(RuntimeError):
    """The error class of later PyTorch."""


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_what_a_device_is_lost_by(error: Exception, is_lost: bool) -> None:
    assert is_device_lost(error) is is_lost


def test_the_cpu_needs_no_choosing() -> None:
    with selected("cpu"):
        assert torch.ones(1).device.type == "cpu"
