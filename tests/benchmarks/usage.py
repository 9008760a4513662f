"""CPU time and memory of a server's whole process tree."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds that the processes have used so far, and the memory they hold now.

    ``rss_mib`` counts pages that processes share once for each of them.
    """

    cpu_s: float
    rss_mib: float


def tree(pid: int) -> list[psutil.Process]:
    """A process and its living descendants; empty once it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def sample(pid: int) -> Usage:
    """Add up a tree."""
    cpu_s, rss = 0.0, 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            # What ended children used counts too: a worker that was replaced did its work.
            cpu_s += times.user + times.system + times.children_user + times.children_system
            rss += process.memory_info().rss
    return Usage(cpu_s, rss / 2**20)
