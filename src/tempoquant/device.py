"""Devices: the default device and its compute dtype, its memory, and whether it still works."""

import contextlib
import gc
from collections.abc import Iterator

import torch


def default_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str) -> torch.dtype:
    """Return the dtype to compute in: bfloat16 on a GPU; float32 on the CPU, where it is faster and
    loses no accuracy.
    """
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def free_memory() -> None:
    """Release the memory of dropped models; their modules form reference cycles, so only the
    collector can.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # page-locked memory; an older PyTorch keeps it for reuse
            torch.accelerator.empty_host_cache()


def is_device_lost(error: Exception) -> bool:
    """Return whether a GPU failed so that this process cannot use it again; running out of memory
    is no such failure.
    """
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return False
    # PyTorch 2.9 and later give this error its own class.
    has_class = type(error).__name__ == "AcceleratorError"
    return has_class or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


@contextlib.contextmanager
def selected(device: str) -> Iterator[None]:
    """Make a GPU the current device within this context: libraries create streams and pin memory
    there.
    """
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield
