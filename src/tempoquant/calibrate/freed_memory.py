"""Give freed memory back to the system: only glibc must be told to, and knows how."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of malloc.h
_MAPPED_FROM_BYTES = 2**20


def map_large_blocks() -> None:
    """Have the C library map every block of a mebibyte or more by itself, for the rest of the process.

    Such a block goes back whole when it is freed. Left alone, glibc raises that size up to 32 MiB as blocks are
    freed, and the tensors below it leave holes in a heap that grows with the number of blocks of the model.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


def give_back_freed_memory() -> None:
    """Have the C library return what was freed below that size."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
