"""Draw the results of a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import matplotlib as mpl

mpl.use("Agg")  # before pyplot

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.benchmarks import sides
from tests.benchmarks.bench import Bench, matching, short
from tests.benchmarks.components import CASES
from tests.benchmarks.report import measured, pipe_figures
from tests.benchmarks.serving import CONNECTIONS, SATURATION
from tests.benchmarks.sides import OURS, TORCH_PEER

_COLORS: Final = {
    OURS: "#c2185b",
    "FastAPI + ORT": "#1f77b4",
    "LitServe": "#6a51a3",
    "BentoML": "#e08214",
    "Ray Serve": "#1b9e77",
    TORCH_PEER: "#7f7f7f",
    "ORT": "#1f77b4",
    "torch": "#e08214",
    "Pillow": "#1b9e77",
}


def draw(bench: Bench) -> None:
    """Write a PNG into ``bench.out`` for each part that was measured."""
    for part, name, plot in (
        ("serving", "serving.png", plot_serving),
        ("pipe", "pipe.png", plot_pipe),
        ("component", "components.png", plot_components),
    ):
        if any(row["part"] == part for row in bench.rows):
            plot(bench, bench.out / name)


def plot_serving(bench: Bench, path: Path) -> None:
    """Draw throughput and latency against the number of connections, with the same network."""
    panels = (
        ("throughput", "photos per second", "Throughput"),
        ("p50_ms", "ms", "Latency, median"),
        ("p95_ms", "ms", "Latency, 95th percentile"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for axis, (key, label, title) in zip(axes, panels, strict=True):
        for name in measured(bench, "fp32"):
            where = {"part": "serving", "precision": "fp32", "side": name, "load": "closed"}
            at = sorted({row["connections"] for row in matching(bench.rows, key, **where)})
            ours = name == OURS
            axis.plot(
                at,
                [bench.median(key, **where, connections=one) for one in at],
                color=_COLORS[name],
                label=name,
                marker="o",
                linewidth=3 if ours else 1.6,
                zorder=3 if ours else 2,
            )
        axis.set(xscale="log", xlabel="connections", ylabel=label, title=title)
        axis.set_xticks(CONNECTIONS, [str(one) for one in CONNECTIONS])
        axis.minorticks_off()
        if key == "throughput":
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.suptitle("500x375 JPEG in, PNG mask out, closed loop")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _save(figure, axes, path)


def plot_pipe(bench: Bench, path: Path) -> None:
    """Draw requests per second without the network."""
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    position, ticks = 0.0, []
    for network, what in (
        ("", OURS),
        ("decoded", "nothing resized"),
        ("mask", "mask ready-made"),
        ("logits", "upsampling"),
    ):
        for name in sides.BATCHING_PEERS if network else (OURS,):
            figures = pipe_figures(bench, network or "logits", name)
            if figures:
                middle = statistics.median(figures)
                error = [[middle - min(figures)], [max(figures) - middle]]
                axis.barh(position, middle, xerr=error, color=_COLORS[name], capsize=3)
                ticks.append((position, f"{name}, {what}" if network else OURS))
                position += 1.0
        position += 0.5
    axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axis.invert_yaxis()
    axis.set(xlabel="requests per second", title=f"Without the network, {SATURATION} connections")
    _save(figure, [axis], path)


def plot_components(bench: Bench, path: Path) -> None:
    """Draw the time of each stage by image size, on a logarithmic axis."""
    figure, axis = plt.subplots(figsize=(10, 8.5), layout="constrained")
    position, ticks, shown = 0.0, [], set()
    for case, names in CASES.items():
        ticks.append((position + (len(names) - 1) / 2, case))
        for name in names:
            width = bench.median("ms", part="component", case=case, side=name)
            label = None if name in shown else name
            shown.add(name)
            axis.barh(position, width, height=0.85, color=_COLORS[name], label=label)
            axis.text(width * 1.06, position, short(width), va="center", fontsize=7)
            position += 1.0
        position += 0.8
    axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axis.invert_yaxis()
    axis.margins(x=0.1, y=0.01)
    axis.set(xscale="log", xlabel="milliseconds", title="Stages by size")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.legend(frameon=False)
    _save(figure, [axis], path)


def _save(figure: Figure, axes: Iterable[Axes], path: Path) -> None:
    for axis in axes:
        axis.grid(visible=True, alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
