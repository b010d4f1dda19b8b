"""Devices: which one is in use and computes in which dtype, whether it still works, and memory to give back."""

import contextlib
import gc
from collections.abc import Iterator

import torch


def default_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str) -> torch.dtype:
    """Return bfloat16 for a GPU, and float32 for the CPU, where it is the faster one and costs no accuracy."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def free_memory() -> None:
    """Give memory of dropped models back: their modules refer to each other in circles, so only the collector can."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # page-locked memory; an older PyTorch keeps it for reuse
            torch.accelerator.empty_host_cache()


def is_device_lost(error: Exception) -> bool:
    """Whether a GPU failed so that this process can do nothing more with it; want of memory is no such failure."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return False
    # PyTorch gave the error a class of its own only lately.
    has_class = type(error).__name__ == "AcceleratorError"
    return has_class or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


@contextlib.contextmanager
def selected(device: str) -> Iterator[None]:
    """Within this context a GPU is the current one: libraries make streams and page-lock memory there."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield
