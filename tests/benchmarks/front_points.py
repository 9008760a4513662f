"""The points of accuracy against CPU time, as a table and a chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib as mpl

mpl.use("Agg")  # before pyplot

from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from tests.benchmarks.bench import markdown_table, short, spread

Role = Literal["default", "artefact", "peer"]

DEFAULT_COLOR: Final = "#c2185b"
COLORS: Final = ("#1f77b4", "#e08214", "#1b9e77", "#6a51a3", "#8c564b")

STYLES: Final[dict[str, dict[str, Any]]] = {
    "fp32": {"linestyle": "--", "marker": "s"},
    "int8": {"linestyle": "-", "marker": "o"},
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A network in one precision at one working size, in pixels of the longest side.

    ``files``: the sha256 of each file it is loaded from.
    """

    network: str
    precision: str
    size: int
    role: Role
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Point(Candidate):
    """A candidate's figures; ``rounds_ms``: milliseconds per photo in each round."""

    miou: float
    pixel_accuracy: float
    rounds_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds_ms)

    def over(self, other: Point) -> list[float]:
        """The ratio of its time to another's, in each round."""
        pairs = zip(self.rounds_ms, other.rounds_ms, strict=True)
        return [ours / theirs for ours, theirs in pairs]

    def beats(self, other: Point) -> bool:
        """Whether it is at least as fast and as accurate, and better in one of the two."""
        no_worse = self.ms <= other.ms and self.miou >= other.miou
        return no_worse and (self.ms < other.ms or self.miou > other.miou)


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats, the fastest first."""
    all_points = list(points)
    kept = [one for one in all_points if not any(other.beats(one) for other in all_points)]
    return sorted(kept, key=lambda point: point.ms)


def table(points: Sequence[Point]) -> str:
    """All points' figures as Markdown, with the ratio of times to each peer's."""
    peers = [point for point in points if point.role == "peer"]
    header = ["", "precision", "size", "mIoU", "pixel accuracy", "ms per photo"]
    header += [f"time over {peer.network}'s" for peer in peers]
    lines = [
        [
            *(point.network, point.precision, str(point.size)),
            *(f"{point.miou:.4f}", f"{point.pixel_accuracy:.4f}", short(point.ms)),
            *(spread(point.over(peer)) for peer in peers),
        ]
        for point in points
    ]
    return markdown_table(header, lines)


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw accuracy over time: a line per network and precision, and the peers' front."""
    figure, axes = plt.subplots(figsize=(11, 7.5), layout="constrained")
    peers = [point for point in points if point.role == "peer"]
    ours = [point for point in points if point.role != "peer"]
    _set_axes(axes, points)
    _draw_front(axes, pareto_front(peers))
    legend = [Line2D([], [], color="0.3", label=name, **style) for name, style in STYLES.items()]
    legend += _draw_ours(axes, ours)
    for peer, marker in zip(peers, cycle("*DP"), strict=False):
        look: dict[str, Any] = {"color": "black", "marker": marker, "linestyle": "none"}
        axes.plot(peer.ms, peer.miou, **look, markersize=18, zorder=5)
        legend.append(Line2D([], [], **look, label=f"{peer.network} ({peer.size})"))
    axes.set_title(title, fontsize="medium")
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _set_axes(axes: Axes, points: Sequence[Point]) -> None:
    times, accuracies = [p.ms for p in points], [p.miou for p in points]
    margin = max(0.01, 0.08 * (max(accuracies) - min(accuracies)))
    axes.set(
        xscale="log",
        xlim=(min(times) / 1.3, max(times) * 1.3),
        ylim=(min(accuracies) - margin, max(accuracies) + margin),
        xlabel="milliseconds per photo, from pixels to mask;"
        " the longest side grows along each line, as labelled on the first network's",
        ylabel="mean IoU",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_front(axes: Axes, front: Sequence[Point]) -> None:
    """Draw the peers' front as steps, up to the edges of the axes."""
    if not front:
        return
    bottom, right = axes.get_ylim()[0], axes.get_xlim()[1]
    accuracies = [point.miou for point in front]
    across = [front[0].ms, *(point.ms for point in front), right]
    up = [bottom, *accuracies, accuracies[-1]]
    axes.step(across, up, where="post", color="0.45", linewidth=1.2)
    axes.fill_between(across, up, bottom, step="post", color="0.5", alpha=0.12)
    axes.text(
        *(0.985, 0.02, "here a peer is at least as fast and as accurate"),
        transform=axes.transAxes,
        ha="right",
        color="0.35",
    )


def _draw_ours(axes: Axes, points: Sequence[Point]) -> list[Line2D]:
    """Draw our lines: a colour per network, a style per precision; returns the colours' legend."""
    others = cycle(COLORS)
    legend = []
    for number, network in enumerate(dict.fromkeys(point.network for point in points)):
        mine = sorted((p for p in points if p.network == network), key=lambda point: point.size)
        default = mine[0].role == "default"
        look: dict[str, Any] = {"color": DEFAULT_COLOR if default else next(others)}
        look |= {"linewidth": 3.2, "zorder": 4} if default else {"linewidth": 1.6, "zorder": 3}
        legend.append(Line2D([], [], **look, label=network + " (default)" * default))
        for precision, style in STYLES.items():
            line = [point for point in mine if point.precision == precision]
            axes.plot([p.ms for p in line], [p.miou for p in line], **look, **style)
            # All networks have the same sizes; labels on every line would overlap.
            for point in line if number == 0 else ():
                _write_size(axes, point, look["color"])
    return legend


def _write_size(axes: Axes, point: Point, color: str) -> None:
    axes.annotate(
        str(point.size),
        (point.ms, point.miou),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        color=color,
        fontsize=9,
        path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
    )
