"""Return of freed memory to the system: only glibc needs a call for it, and offers one."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of malloc.h
_MAPPED_FROM_BYTES = 2**20


def map_large_blocks() -> None:
    """Make the C library map every block of a mebibyte or more separately, for the rest of the
    process.

    Such a block returns to the system whole when it is freed. By default, glibc raises that
    threshold up to 32 MiB as blocks are freed; tensors below it leave holes in a heap that grows
    with the number of blocks of the model.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


def give_back_freed_memory() -> None:
    """Make the C library return freed memory below that size."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
