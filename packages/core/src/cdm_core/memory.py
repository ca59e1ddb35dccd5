"""Freed memory stays with the process: a training step asks for the same blocks over and over.

glibc gives large blocks back to the system when they are freed, and the next step pays a page fault for every
4 KiB of them again: a third of a training step on two cores, more than any kernel costs.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of malloc.h
_KEPT = 1 << 30
_LARGEST_OF_OLD = 32 << 20  # HEAP_MAX_SIZE / 2: what older versions accept at most


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed blocks up to 1 GiB for reuse; False where malloc is another one.

    For the whole process and for good, so only programs call it, never an import.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    mapped = mallopt(_MMAP_THRESHOLD, _KEPT) or mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD)
    return bool(mapped and mallopt(_TRIM_THRESHOLD, _KEPT))
