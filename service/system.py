"""What this container or machine has, and how much freed memory glibc's allocator keeps.

Source of the latter: glibc, ``mallopt(3)`` and ``malloc_trim(3)``; other allocators are unaffected.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

_PR_SET_DUMPABLE: Final = 4

# mallopt's parameters, from glibc's malloc.h, and their values.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_KEPT_BUFFER_BYTES: Final = 4 * 2**20
_KEPT_BYTES: Final = 64 * 2**20


def memory_limit_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """The memory limit of this container, or the machine's memory if that is less.

    ``root``: where a container sees its own control group. Source: Linux,
    Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int((root / name).read_text(encoding="ascii")))
    return min(limits)


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


def hide_memory() -> None:
    """Let no other process of this user read this one's memory and environment.

    An image worker may be under the control of the file that it decodes. Source: Linux,
    ``PR_SET_DUMPABLE``.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def give_back_freed() -> None:
    """Return all free memory, including the many small pieces of a closed model's weights."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
