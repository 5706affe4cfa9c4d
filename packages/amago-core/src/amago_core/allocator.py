"""Keeping freed memory inside the process.

glibc takes every block above a threshold (at first 128 KiB, at most 32 MiB) straight from the kernel and gives it back
when it is freed. The large temporaries of an update are such blocks, thousands of them: each time the kernel must map
fresh pages and fill them with zeros, which costs 10 to 15 % of an update on the CPU. With the thresholds raised, freed
blocks stay in the heap and are used again; the process keeps its largest size until it ends.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ONE_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks of up to 1 GiB instead of returning them to the kernel.

    Calling it again changes nothing; it holds for the whole process.

    Returns:
        True if the allocator accepted; False where it is not glibc's.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # other C libraries, such as musl, have no mallopt
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    accepted = [mallopt(option, _ONE_GIB) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(accepted)
