"""What a server's processes hold. Linux's ``/proc``: proc_pid_statm(5), proc_pid_fd(5)."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Resources:
    """Of a process and all below it. ``rss_mib`` counts shared pages once for each process."""

    rss_mib: float
    descriptors: int
    threads: int


def sample(pid: int) -> Resources:
    """Add up what they hold now."""
    pages = descriptors = threads = 0
    for folder in _tree(Path(f"/proc/{pid}")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            pages += int((folder / "statm").read_text(encoding="ascii").split()[1])
            descriptors += len([*(folder / "fd").iterdir()])
            threads += len([*(folder / "task").iterdir()])
    return Resources(pages * mmap.PAGESIZE / 2**20, descriptors, threads)


def _tree(folder: Path) -> Iterator[Path]:
    yield folder
    for children in folder.glob("task/*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in children.read_text(encoding="ascii").split():
                yield from _tree(folder.parent / child)
