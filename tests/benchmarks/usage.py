"""CPU time and memory of a server's whole process tree."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds used so far, and resident memory now.

    ``rss_mib`` counts a shared page once per process.
    """

    cpu_s: float
    rss_mib: float


def tree(pid: int) -> list[psutil.Process]:
    """A process and its living descendants; empty if the process has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def sample(pid: int) -> Usage:
    """Sum the usage of a process tree."""
    cpu_s, rss = 0.0, 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            # Count children that have ended, such as replaced workers.
            cpu_s += times.user + times.system + times.children_user + times.children_system
            rss += process.memory_info().rss
    return Usage(cpu_s, rss / 2**20)
