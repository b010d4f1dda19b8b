"""Give freed memory back to the system."""

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Have the C library return what was freed: it keeps fragments, so that a process would grow from block to block.

    Only glibc needs it and knows how.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
