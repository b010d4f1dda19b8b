"""Memory of models that nobody needs any more."""

import gc

import torch


def free_memory() -> None:
    """Give memory of dropped models back: their modules refer to each other in circles, so only the collector can."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # page-locked memory; an older PyTorch keeps it for reuse
            torch.accelerator.empty_host_cache()
