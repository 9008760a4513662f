"""What glibc's allocator keeps and gives back; with any other these do nothing.

Source: glibc, ``mallopt(3)`` and ``malloc_trim(3)``.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Final

# mallopt's parameters, from glibc's malloc.h, and what they are set to.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_KEPT_BUFFER_BYTES: Final = 4 * 2**20
_KEPT_BYTES: Final = 64 * 2**20


def keep_freed_buffers() -> None:
    """Keep the buffers of one photo for the next, whichever thread it is in.

    To be called before there is a second thread.

    Left alone the allocator gives each buffer of half a megabyte back to the kernel, and taking it
    again page by page is half the time of resizing a 500x375 photo. Larger ones are still given
    back.

    Nor does each thread get a part of the memory of its own, of which none takes another's: those
    parts filled one by one, over thousands of requests, and a model's weights stayed in them.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BUFFER_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back_freed() -> None:
    """Give back all that is free: a model's weights lie in pieces too small to go by themselves."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
