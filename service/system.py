"""What this container or machine has."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path


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
