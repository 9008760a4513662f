"""What every run of the benchmarks shares: its rows, its targets, where it ran, its tables.

Imports no peer and no torch: the GPU's benchmarks run where only the service's packages are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]

_CHECKOUT: Final = Path(__file__).resolve().parents[2]
"""Not that of `servers`, which needs psutil."""


@dataclass(slots=True)
class Bench:
    """One run: where it works, what it serves and sends, and what it has measured so far.

    ``rows`` has one entry per measured window; ``masks`` the least share of pixels of any photo in
    which a side's mask equals ours, by ``precision/side``.
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
        """The servers' output."""
        return self.out / "logs"

    def add(self, **row: Any) -> None:  # noqa: ANN401 - figures and names
        """Keep and print a row."""
        self.rows.append(row)
        shown = (
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in row.items()
        )
        print(f"[{time.strftime('%H:%M:%S')}]", *shown, flush=True)

    def median(self, figure: str, **wanted: object) -> float:
        """Median over the rounds of one figure; nan without any."""
        found = [
            row[figure]
            for row in self.rows
            if figure in row and all(row.get(key) == value for key, value in wanted.items())
        ]
        return statistics.median(found) if found else float("nan")


@dataclass(frozen=True, slots=True)
class Gate:
    """One target: the figures that speak to it (one for each round), and its bound.

    ``at_least`` and ``at_most``: the bound that the median has to keep.
    """

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
    def kept(self) -> bool | None:
        """Whether the median keeps the bound; None where there is none of either."""
        if not self.figures:
            return None
        if self.at_least is not None:
            return self.median >= self.at_least
        if self.at_most is not None:
            return self.median <= self.at_most
        return None

    @property
    def target(self) -> str:
        """The bound in words."""
        if self.at_least is not None:
            return f">= {self.at_least:g} {self.unit}"
        return "" if self.at_most is None else f"<= {self.at_most:g} {self.unit}"


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Where and with what this was measured; ``packages`` that are not installed are left out."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = _git("rev-parse", "HEAD")
    # The results themselves change nothing of what is measured.
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
    """What git says of this checkout; nothing where there is no git, or no checkout."""
    try:
        done = subprocess.run(
            ("git", "-C", str(_CHECKOUT), *arguments), capture_output=True, text=True, check=False
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


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spread(figures: Sequence[float]) -> str:
    """Median (least..greatest); nothing of no figures."""
    if not figures:
        return ""
    middle = statistics.median(figures)
    return f"{short(middle)} ({short(min(figures))}..{short(max(figures))})"


def short(figure: float) -> str:
    """Three digits, without an exponent."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def figures_of(bench: Bench, figure: str, **wanted: object) -> list[float]:
    """One figure of every round, in the order of the rounds."""
    return [
        row[figure]
        for row in bench.rows
        if figure in row and all(row.get(key) == value for key, value in wanted.items())
    ]
