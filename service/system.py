"""What this container or machine has, and how much freed memory glibc's allocator keeps.

Source of the latter: glibc, ``mallopt(3)`` and ``malloc_trim(3)``; other allocators are unaffected.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

_PR_SET_DUMPABLE: Final = 4
_FALLOC_KEEP_SIZE: Final = 1
_FALLOC_PUNCH_HOLE: Final = 2

# mallopt's parameters, from glibc's malloc.h, and their values.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_KEPT_BUFFER_BYTES: Final = 4 * 2**20
_KEPT_BYTES: Final = 64 * 2**20


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The least memory limit of this process's control groups, or the machine's memory if less.

    ``root``: where ``proc`` and ``sys`` are. Source: Linux, Documentation/admin-guide/cgroup-v2.rst
    and cgroup-v1/memory.rst.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE]
    for group in _control_groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((group / name).read_text(encoding="ascii")))
    return min(limits)


def available_cores(root: Path = Path("/")) -> int:
    """The CPU cores that this process may use; in a container, not all of the machine's.

    The least of its affinity and its control groups' quotas, rounded up: more threads would be
    throttled in the middle of a run. ``root``: where ``proc`` and ``sys`` are. Source: Linux,
    cgroup-v2.rst and scheduler/sched-bwc.rst.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        cores = os.cpu_count() or 1
    for group in _control_groups("cpu", root):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                texts = [(group / name).read_text(encoding="ascii") for name in names]
                quota, period = map(int, " ".join(texts).split())
                if quota > 0:  # -1: no quota
                    cores = min(cores, math.ceil(quota / period))
    return cores


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control groups, of both versions: its own and those above it.

    A limit of any of them holds. Some of the folders may not exist: a container may see only its
    own group, at the top. Source: Linux, ``cgroups(7)``, ``/proc/pid/cgroup``.
    """
    try:
        text = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # only Linux has it
        return
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = PurePosixPath(path.lstrip("/"))
        yield from (top / one for one in (group, *group.parents))


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


def free_range(number: int, offset: int, size: int) -> None:
    """Free the memory of a part of a file in memory, which then reads as zeros.

    `mmap.madvise` does the same, but keeps all other threads waiting: 50 ms for 150 MiB. Where the
    kernel cannot do it, the file keeps its memory. Source: Linux, ``fallocate(2)``.
    """
    with contextlib.suppress(AttributeError, OSError):
        fallocate = ctypes.CDLL(None).fallocate
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        fallocate(number, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, size)


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
