"""Freed memory stays with the process: a training step asks for the same blocks over and over.

glibc gives large blocks back to the system when they are freed, and the next step pays a page fault for every
4 KiB of them again: about a tenth of a training step on two cores at 16x16 pixels.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of malloc.h
_KEPT = 1 << 30
# Larger blocks come and go by themselves, as without us: aligned ones can leave holes of their size behind.
_LARGEST = 32 << 20


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep up to 1 GiB of freed blocks for reuse; False where there is no glibc.

    For the whole process and for good, so only programs call it, never an import.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))
