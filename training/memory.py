"""Reuse of freed memory: on a small virtual machine, returning it costs more time than the training
itself.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed blocks instead of returning them to the system; does nothing
    elsewhere.

    By default every large tensor is mapped and unmapped anew, and its pages are faulted in and
    zeroed again in each training step; without this call the processors spend most of their time in
    the kernel.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
