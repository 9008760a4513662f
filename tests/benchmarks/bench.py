"""Shared by all benchmarks: rows, targets, the machine's description, timing and tables.

Imports the standard library only, so that every environment can use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]

ROOT: Final = Path(__file__).resolve().parents[2]
"""The checkout."""

_MOST_RUNS: Final = 2000


@dataclass(slots=True)
class Bench:
    """One run: its output folder, the artefact served, the photos sent and the results so far.

    ``rows`` has one entry per measured window. ``masks`` maps ``precision/side`` to the share of
    pixels, in [0, 1], in which that side's mask equals ours, for the photo with the fewest.
    """

    out: Path
    artefact: Path
    photos: Sequence[Path]
    rounds: int
    quick: bool
    rows: list[Row] = field(default_factory=list)
    masks: dict[str, float] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        """The folder for the servers' output."""
        return self.out / "logs"

    def add(self, **row: Any) -> None:  # noqa: ANN401 - figures and names
        """Store and print a row."""
        self.rows.append(row)
        shown = (
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in row.items()
        )
        print(f"[{time.strftime('%H:%M:%S')}]", *shown, flush=True)

    def median(self, figure: str, **wanted: object) -> float:
        """Median of one figure over the rounds; nan if there is none."""
        found = figures_of(self, figure, **wanted)
        return statistics.median(found) if found else float("nan")


@dataclass(frozen=True, slots=True)
class Target:
    """A target: one figure per round, and the bound that their median must meet."""

    name: str
    figures: tuple[float, ...]
    unit: str = "x"
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.figures)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the bound; None without figures or without a bound."""
        if not self.figures:
            return None
        if self.at_least is not None:
            return self.median >= self.at_least
        if self.at_most is not None:
            return self.median <= self.at_most
        return None

    @property
    def bound(self) -> str:
        """The bound as text; empty if there is none."""
        if self.at_least is not None:
            return f">= {self.at_least:g} {self.unit}"
        return "" if self.at_most is None else f"<= {self.at_most:g} {self.unit}"


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """The machine, the commit and the versions of those ``packages`` that are installed."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = _git("rev-parse", "HEAD")
    # Changed result files do not affect a measurement.
    measured = ("--", ".", ":!tests/benchmarks/results")
    changed = _git("status", "--porcelain", *measured) + _git("diff", "HEAD", *measured)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": (commit or "unknown") + ("+changes" if changed else ""),
        "changes": hashlib.sha256(changed.encode()).hexdigest()[:12] if changed else "",
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_gib, 1),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": _versions(packages),
    }


def _git(*arguments: str) -> str:
    """The output of a git command in this checkout; empty without git or a repository."""
    try:
        done = subprocess.run(
            ("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def short_commit(machine: Mapping[str, Any]) -> str:
    """The first digits of an `environment`'s commit, and whether there were changes to it."""
    commit: str = machine["commit"]
    return commit[:12] + ("+changes" if commit.endswith("+changes") else "")


def first_line(exc: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(exc).__name__}: {(str(exc).strip() or 'no reason given').splitlines()[0]}"


def seconds_each(
    run: Callable[[], object], wait: Callable[[], object], least_s: float
) -> list[float]:
    """Seconds per run, measured three times, each over enough runs to fill ``least_s``.

    ``wait`` blocks until the device has finished what ``run`` queued. Runs are warm and
    back to back.
    """
    # ONNX Runtime captures a graph in the second run; PyTorch's compiled graphs take longer.
    for _ in range(5):
        run()
    wait()
    started = time.perf_counter()
    run()
    wait()
    once_s = max(1e-6, time.perf_counter() - started)
    runs = min(_MOST_RUNS, max(1, round(least_s / once_s)))
    found = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(runs):
            run()
        wait()
        found.append((time.perf_counter() - started) / runs)
    return found


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spread(figures: Sequence[float]) -> str:
    """``median (least..greatest)``; empty without figures."""
    if not figures:
        return ""
    middle = statistics.median(figures)
    return f"{short(middle)} ({short(min(figures))}..{short(max(figures))})"


def short(figure: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def matching(rows: Iterable[Row], figure: str, **wanted: object) -> list[Row]:
    """The rows that have a figure and the wanted values."""
    return [row for row in rows if figure in row and wanted.items() <= row.items()]


def figures_of(bench: Bench, figure: str, **wanted: object) -> list[float]:
    """One figure for each round, in the order of the rounds."""
    return [row[figure] for row in matching(bench.rows, figure, **wanted)]
