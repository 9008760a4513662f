"""Control how much freed memory glibc's allocator keeps; other allocators are unaffected.

Source: glibc, ``mallopt(3)`` and ``malloc_trim(3)``.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

# mallopt's parameters, from glibc's malloc.h, and their values.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_KEPT_BUFFER_BYTES: Final = 4 * 2**20
_KEPT_BYTES: Final = 64 * 2**20


def keep_freed_buffers() -> None:
    """Reuse the buffers of one photo for the next, across threads.

    Call this before the process starts a second thread.

    By default the allocator returns each buffer of half a megabyte to the kernel. Getting it back
    page by page takes half the time of resizing a 500x375 photo. Larger buffers are still returned.

    All threads share one arena. With an arena per thread, the arenas filled one by one over
    thousands of requests, and a closed model's weights stayed in them.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BUFFER_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_freed() -> None:
    """Return all free memory, including the many small pieces of a closed model's weights."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
