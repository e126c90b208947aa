"""How the C library keeps freed memory on a CPU-only run."""

from __future__ import annotations

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks for the next step instead of returning them to the kernel.

    On a CPU every large activation is otherwise mapped, zeroed page by page and unmapped in each
    step. Keeping them made r_nano's training step 1.4 times faster (batch 32, 2 threads), at about
    a tenth more resident memory.

    Returns:
        True if it took effect (Linux with glibc), False where there is no such switch.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    largest = 2**31 - 1
    return bool(
        library.mallopt(_M_MMAP_THRESHOLD, 2**30) and library.mallopt(_M_TRIM_THRESHOLD, largest)
    )


def return_freed_memory() -> None:
    """Returns free memory to the kernel once, after work that will not be repeated."""
    gc.collect()
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
