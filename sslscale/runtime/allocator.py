"""glibc's allocator, set for work that needs the same large blocks over and over."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


def keep_freed_memory() -> None:
    """From now on this process keeps what it frees, for its next allocation.

    A network's activations on a CPU are blocks that glibc would map anew for every layer and step (above 32 MiB it
    always does), and the kernel would fill each with zeros, page by page, at several times the cost of most layers.
    What the process holds then stays at its peak. Nothing is done where the C library is another.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
