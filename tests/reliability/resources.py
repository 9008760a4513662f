"""Memory, descriptors and threads of a process tree, from Linux's ``/proc``.

See proc_pid_statm(5) and proc_pid_fd(5).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of a process and its descendants. ``rss_mib`` counts a shared page per process."""

    rss_mib: float
    descriptors: int
    threads: int


def sample(pid: int) -> Resources:
    """Sum the current resources of a process and its descendants."""
    pages = descriptors = threads = 0
    for folder in tree(Path(f"/proc/{pid}")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the process has ended
            pages += int((folder / "statm").read_text(encoding="ascii").split()[1])
            descriptors += len([*(folder / "fd").iterdir()])
            threads += len([*(folder / "task").iterdir()])
    return Resources(pages * mmap.PAGESIZE / 2**20, descriptors, threads)


def tree(folder: Path) -> Iterator[Path]:
    """The folders in ``/proc`` of a process and its descendants."""
    yield folder
    for children in folder.glob("task/*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in children.read_text(encoding="ascii").split():
                yield from tree(folder.parent / child)
