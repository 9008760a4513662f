"""Limits of control groups, and memory that the allocator returns, on Linux with glibc."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from service.system import available_cores, give_back_freed, memory_limit_bytes
from tests.reliability.resources import sample


def test_what_is_free_between_what_is_used_is_given_back() -> None:
    """A closed model's pieces are scattered among pieces still in use."""
    pieces = [bytearray(64 * 1024) for _ in range(2 * 1024)]
    kept = pieces[::16]
    del pieces
    before = sample(os.getpid())
    give_back_freed()
    assert before.rss_mib - sample(os.getpid()).rss_mib > 64
    assert len(kept) == 128


MIB = 2**20
UNLIMITED = f"{2**63 - 4096}\n"


def write_tree(root: Path, groups: str, files: Mapping[str, str]) -> Path:
    """A machine's ``/proc`` and ``/sys`` under ``root``; ``files``: below ``/sys/fs/cgroup``."""
    for path, text in {"proc/self/cgroup": groups, **at("sys/fs/cgroup", files)}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def at(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    """The files with paths below ``folder``."""
    return {f"{folder}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        # A container that sees only its own group.
        ("0::/\n", {"memory.max": "67108864\n"}),
        # A systemd service with MemoryMax=, and one in a slice that has it.
        ("0::/system.slice/fcn.service\n", {"system.slice/fcn.service/memory.max": "67108864\n"}),
        (
            "0::/system.slice/fcn.service\n",
            {"system.slice/fcn.service/memory.max": "max\n", "system.slice/memory.max": "67108864"},
        ),
        # The least counts, whose ever it is.
        ("0::/a/b\n", {"a/b/memory.max": "134217728\n", "a/memory.max": "67108864\n"}),
        ("0::/a/b\n", {"a/b/memory.max": "67108864\n", "a/memory.max": "134217728\n"}),
        # Version 1: docker mounts the container's own group, whose path is not below it.
        (
            "4:memory:/docker/0a1b\n3:cpu,cpuacct:/docker/0a1b\n",
            {"memory/memory.limit_in_bytes": "67108864\n"},
        ),
        (
            "12:cpuset:/\n4:memory:/kubepods/pod1/0a1b\n0::/kubepods\n",
            {
                "memory/kubepods/pod1/0a1b/memory.limit_in_bytes": UNLIMITED,
                "memory/kubepods/pod1/memory.limit_in_bytes": "67108864\n",
                "memory/memory.limit_in_bytes": UNLIMITED,
            },
        ),
    ],
)
def test_the_least_memory_limit_of_all_control_groups(
    tmp_path: Path, groups: str, files: Mapping[str, str]
) -> None:
    """Of the process's own group and of those above it, in both versions."""
    others = {"other/memory.max": "4096\n", "memory/other/memory.limit_in_bytes": "4096\n"}
    assert memory_limit_bytes(write_tree(tmp_path, groups, {**files, **others})) == 64 * MIB


@pytest.mark.parametrize("files", [{}, {"memory.max": "max\n"}, {"memory.max": UNLIMITED}])
def test_without_a_limit_all_memory_counts(tmp_path: Path, files: Mapping[str, str]) -> None:
    """Without control groups too."""
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert memory_limit_bytes(tmp_path) == everything
    assert memory_limit_bytes(write_tree(tmp_path, "0::/\n", files)) == everything


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        (
            "3:cpu,cpuacct:/docker/0a1b\n",
            {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        (
            "3:cpu,cpuacct:/a\n",
            {
                "cpu/a/cpu.cfs_quota_us": "-1\n",
                "cpu/a/cpu.cfs_period_us": "100000\n",
                "cpu/cpu.cfs_quota_us": "400000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_available_cores_respect_quotas(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: Mapping[str, str],
    cores: int,
) -> None:
    """`docker run --cpus` and systemd's ``CPUQuota=`` set a quota, not an affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert available_cores(tmp_path) == 8
    assert available_cores(write_tree(tmp_path, groups, files)) == cores
