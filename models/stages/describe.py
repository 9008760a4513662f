"""Describe a network: its stages' sizes, receptive fields, parameters and multiply-adds.

    python -m models describe context_fcn_resnet50_8s
    python -m models describe context_fcn_resnet50_8s --format svg --out network.svg

The result is a table, a JSON tree with every layer, or a picture. Sizes and multiply-adds are for
one image of 512x512 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Final

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from models.networks import NETWORKS, build_network
from models.structure import IMAGE, SIDE, Stage, Structure, structure_of
from service.artefact.files import replace_file, write_atomically

COLUMNS: Final = {
    "output": 5.95,
    "stride": 6.45,
    "receptive field": 7.4,
    "parameters": 8.55,
    "multiply-adds": 9.65,
}
"""Figures of a stage, and where their column ends in the picture, in inches."""
LEFT, CENTER, NAME = 0.4, 1.9, 2.75
"""Margin, middle of the blocks and start of the names in the picture, in inches."""
COLORS: Final = {"backbone": "#5f7f9b", "classifier": "#c28e55", IMAGE: "#cbd3da"}


def describe(name: str) -> Structure:
    """Return the structure of the network called ``name``, without making its weights."""
    with torch.device("meta"):
        return structure_of(build_network(name))


def figures_of(stage: Stage | Structure) -> dict[str, str]:
    """Return a stage's figures as text, by the titles in `COLUMNS`; a network's without output."""
    adds, field = stage.multiply_adds, stage.receptive_field
    figures = {
        "stride": str(stage.stride),
        "receptive field": "whole image" if field is None else f"{field} px",
        "parameters": f"{stage.parameters:,}",
        "multiply-adds": f"{adds / 1e6:.2f} M" if adds < 1e6 else f"{adds / 1e9:.3f} G",
    }
    if isinstance(stage, Stage):
        figures["output"] = f"{stage.channels} x {stage.height} x {stage.width}"
    return figures


def totals(structure: Structure) -> str:
    """Return the network's figures in a line."""
    figures = figures_of(structure)
    return (
        f"{figures['parameters']} parameters, {figures['multiply-adds']} multiply-adds at "
        f"{SIDE}x{SIDE}, stride {structure.stride}, receptive field: {figures['receptive field']}"
    )


def format_json(name: str, structure: Structure) -> str:
    """Return the network as a tree in JSON: network, stages, layers; see `Structure`."""
    return json.dumps({"name": name, "image": [3, SIDE, SIDE], **asdict(structure)}, indent=2)


def format_table(name: str, structure: Structure) -> str:
    """Return the network's totals and a line for each stage."""
    rows = [["stage", *COLUMNS, "reads"]]
    for stage in structure.stages:
        figures = figures_of(stage)
        row = [stage.name, *(figures[title] for title in COLUMNS), ", ".join(stage.inputs)]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name}: {totals(structure)}", ""]
    for first, *middle, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join((first.ljust(widths[0]), *cells, last)))
    return "\n".join(lines)


def draw(name: str, structure: Structure) -> Figure:
    """Return a picture of the network: a row for each stage, and arrows from its inputs."""
    outputs = [(IMAGE, 3, SIDE), *((s.name, s.channels, s.height) for s in structure.stages)]
    figure = Figure(figsize=(10, 0.46 * (len(outputs) + 3.5)))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(len(outputs) + 0.5, -3))
    axes.axis("off")
    axes.text(LEFT, -2, name, size=14, weight="bold")
    axes.text(LEFT, -1.4, totals(structure), size=8, color="0.4")
    for title, right in COLUMNS.items():
        axes.text(right, -0.6, title, size=7, color="0.4", ha="right")
    blocks: dict[str, Rectangle] = {}
    for row, (stage_name, channels, side) in enumerate(outputs):
        part, _, label = stage_name.partition(".")
        width, height = 0.14 + 1.1 * math.log(side, SIDE), 0.11 + 0.048 * math.log2(channels)
        corner = (CENTER - width / 2, row - height / 2)
        blocks[stage_name] = Rectangle(corner, width, height, color=COLORS[part], lw=0)
        axes.add_patch(blocks[stage_name])
        axes.text(NAME, row, label or part, size=8, va="center")
    for row, stage in enumerate(structure.stages, 1):
        axes.axhline(row - 0.5, NAME / 10, 0.965, color="0.92", lw=0.6)
        figures = figures_of(stage)
        for title, right in COLUMNS.items():
            axes.text(right, row, figures[title], size=8, ha="right", va="center")
        for source in stage.inputs:
            _draw_arrow(axes, blocks[source], blocks[stage.name])
    size = f"3 x {SIDE} x {SIDE}"
    axes.text(COLUMNS["output"], 0, size, size=8, ha="right", va="center")
    note = "Blocks: resolution across, channels down, logarithmic. Blue: backbone. Brown: head."
    axes.text(LEFT, len(outputs), note, size=7, color="0.4")
    return figure


def _draw_arrow(axes: Axes, source: Rectangle, target: Rectangle) -> None:
    """Straight down to the next row, or in a bow to the left of the rows between."""
    start, end = (block.get_y() + block.get_height() / 2 for block in (source, target))
    if end - start < 1.5:
        ends = ((CENTER, source.get_y() + source.get_height()), (CENTER, target.get_y()))
        bow = 0.0
    else:
        ends, bow = ((source.get_x(), start), (target.get_x(), end)), 0.45
    arrow = FancyArrowPatch(
        *ends,
        arrowstyle="-|>",
        connectionstyle=f"arc3,rad={bow}",
        mutation_scale=7,
        color="0.45",
        zorder=0,
    )
    axes.add_patch(arrow)


TEXTS: Final = {"table": format_table, "json": format_json}
PICTURES: Final = ("svg", "png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("name", metavar="NAME", choices=NETWORKS, help="name of the network")
    parser.add_argument("--format", choices=(*TEXTS, *PICTURES), default="table")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: text to the terminal, a picture to NAME.FORMAT",
    )


def main(args: argparse.Namespace) -> int:
    """Print the description, or write it into a file."""
    structure = describe(args.name)
    if args.format in PICTURES:
        path = args.out or Path(f"{args.name}.{args.format}")
        # Text stays text, and the same network gives the same file: no date, no random ids.
        style = mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": args.name})
        with style, write_atomically(path) as file:
            draw(args.name, structure).savefig(
                file, format=args.format, dpi=150, metadata={"Date": None}
            )
        print(path)
        return 0
    text = TEXTS[args.format](args.name, structure)
    if args.out is None:
        print(text)
    else:
        replace_file(args.out, f"{text}\n".encode())
        print(args.out)
    return 0
