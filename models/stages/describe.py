"""Describe a network: its stages' sizes, receptive fields, parameters and multiply-adds.

    python -m models describe context_fcn_resnet50_8s
    python -m models describe context_fcn_resnet50_8s --format svg --out network.svg

As a table, as a tree in JSON that goes down to the single layers, or as a picture. Sizes and
multiply-adds are those for one image of 512x512 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Curve

from models.networks import NETWORKS, build_network
from models.structure import IMAGE, SIDE, Stage, Structure, structure_of


def describe(name: str) -> Structure:
    """Return the structure of the network called ``name``, without making its weights."""
    with torch.device("meta"):
        network = build_network(name)
    return structure_of(network)


def pixels(receptive_field: int | None) -> str:
    """Return a receptive field as text."""
    return "whole image" if receptive_field is None else f"{receptive_field} px"


def billions(multiply_adds: int) -> str:
    """Return a number of multiply-adds as text."""
    small = multiply_adds < 1e6
    return f"{multiply_adds / 1e6:.2f} M" if small else f"{multiply_adds / 1e9:.3f} G"


class Column(NamedTuple):
    """Figures of a stage: their title, their text, and what a bar shows the stage's share of."""

    title: str
    text: Callable[[Stage], str]
    share: Callable[[Stage], int] | None = None


COLUMNS: Final = (
    Column("output", lambda stage: f"{stage.channels} x {stage.height} x {stage.width}"),
    Column("stride", lambda stage: str(stage.stride)),
    Column("receptive field", lambda stage: pixels(stage.receptive_field)),
    Column("parameters", lambda stage: f"{stage.parameters:,}", lambda stage: stage.parameters),
    Column(
        "multiply-adds",
        lambda stage: billions(stage.multiply_adds),
        lambda stage: stage.multiply_adds,
    ),
)


# ---- as text -------------------------------------------------------------------------------------


def format_json(name: str, structure: Structure) -> str:
    """Return the network as a tree in JSON: network, stages, layers; see `Structure`."""
    return json.dumps({"name": name, "image": [3, SIDE, SIDE], **asdict(structure)}, indent=2)


def format_table(name: str, structure: Structure) -> str:
    """Return the stages as text, a line each, after the network's totals."""
    rows = [["stage", *(column.title for column in COLUMNS), "reads"]]
    for stage in structure.stages:
        figures = [column.text(stage) for column in COLUMNS]
        rows.append([stage.name, *figures, ", ".join(stage.inputs)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [totals(name, structure), ""]
    for first, *figures, last in rows:
        cells = [cell.rjust(width) for cell, width in zip(figures, widths[1:-1], strict=True)]
        lines.append("  ".join((first.ljust(widths[0]), *cells, last)))
    return "\n".join(lines)


def totals(name: str, structure: Structure) -> str:
    """Return the network in a line."""
    return (
        f"{name}: {structure.parameters:,} parameters, {billions(structure.multiply_adds)} "
        f"multiply-adds at {SIDE}x{SIDE}, stride {structure.stride}, "
        f"receptive field: {pixels(structure.receptive_field)}"
    )


# ---- as a picture --------------------------------------------------------------------------------

WIDTH, TOP, ROW, BOTTOM = 10.0, 1.2, 0.46, 0.5
"""Of the page, above the rows, of a row, below them: in inches, like everything here."""
BLOCK, NAME = 1.9, 2.75
"""Where the blocks' middle and their names are."""
RIGHTS = (5.95, 6.45, 7.4, 8.55, 9.65)
"""Where the columns end."""
LANE, LANES = 1.14, 0.15
"""Where the innermost lane of arrows past other blocks is, and how far the next."""
BAR, CORNER = 0.95, 0.07
INK, FAINT, RULE = "#22303c", "#71808f", "#e7ebef"
COLORS = {"backbone": "#5f7f9b", "classifier": "#c28e55", IMAGE: "#cbd3da"}
FONT_SIZE = 8


class Block:
    """Where a stage's block is; its width is its resolution, its height its channels, as logs."""

    def __init__(self, row: int, channels: int, side: int) -> None:
        self.row = row
        self.y = TOP + ROW * (row + 0.5)
        self.width = 0.14 + 1.1 * math.log(side) / math.log(SIDE)
        self.height = 0.05 + 0.022 * math.log2(channels)
        self.left = BLOCK - self.width / 2
        self.top, self.bottom = self.y - self.height / 2, self.y + self.height / 2


def draw(name: str, structure: Structure) -> Figure:
    """Return a picture of the network: a row for each stage, and arrows for what it reads."""
    height = TOP + ROW * (len(structure.stages) + 1) + BOTTOM
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    title, _, rest = totals(name, structure).partition(": ")
    axes.text(0.4, 0.45, title, size=14, weight="bold", color=INK)
    axes.text(0.4, 0.72, rest, size=FONT_SIZE, color=FAINT)
    for column, right in zip(COLUMNS, RIGHTS, strict=True):
        axes.text(right, TOP - 0.05, column.title, size=FONT_SIZE - 1, color=FAINT, ha="right")
    blocks = {IMAGE: Block(0, 3, SIDE)}
    size = f"3 x {SIDE} x {SIDE}"
    axes.text(RIGHTS[0], blocks[IMAGE].y, size, size=FONT_SIZE, color=INK, ha="right", va="center")
    for row, stage in enumerate(structure.stages, start=1):
        blocks[stage.name] = Block(row, stage.channels, stage.height)
        _write_figures(axes, blocks[stage.name].y, stage, structure)
    for stage_name, block in blocks.items():
        _draw_block(axes, block, stage_name)
    _draw_arrows(axes, blocks, structure)
    note = (
        "Blocks: resolution across, channels down, both logarithmic. Blue: backbone. Brown: head."
    )
    axes.text(0.4, height - 0.22, note, size=FONT_SIZE - 1, color=FAINT)
    return figure


def _draw_block(axes: Axes, block: Block, name: str) -> None:
    part, _, label = name.partition(".")
    patch = FancyBboxPatch(
        (block.left, block.top),
        block.width,
        block.height,
        "round,pad=0,rounding_size=0.03",
        color=COLORS[part],
        linewidth=0,
    )
    axes.add_patch(patch)
    axes.text(NAME, block.y, label or part, size=FONT_SIZE, color=INK, va="center")
    axes.plot((NAME, RIGHTS[-1]), (block.y + ROW / 2,) * 2, color=RULE, linewidth=0.6)


def _write_figures(axes: Axes, y: float, stage: Stage, structure: Structure) -> None:
    for column, right in zip(COLUMNS, RIGHTS, strict=True):
        axes.text(right, y, column.text(stage), size=FONT_SIZE, color=INK, ha="right", va="center")
        if column.share is not None:
            part = column.share(stage) / max(map(column.share, structure.stages))
            corner = (right - part * BAR, y + 0.1)
            axes.add_patch(Rectangle(corner, part * BAR, 0.04, color=COLORS["backbone"], lw=0))


def _draw_arrows(axes: Axes, blocks: dict[str, Block], structure: Structure) -> None:
    """Straight to the next row; past other rows, in a lane that each source has for itself."""
    skips: dict[Block, list[Block]] = {}
    for stage in structure.stages:
        block = blocks[stage.name]
        for source in map(blocks.__getitem__, stage.inputs):
            if source.row == block.row - 1:
                _arrow(axes, Curve([(BLOCK, source.bottom), (BLOCK, block.top)]))
            else:
                skips.setdefault(source, []).append(block)
    lanes = _lanes({source: targets[-1].row for source, targets in skips.items()})
    for source, targets in skips.items():
        for target in targets:
            _arrow(axes, _past(source, target, LANE - LANES * lanes[source]))


def _lanes(ends: dict[Block, int]) -> dict[Block, int]:
    """Number the sources' lanes from the blocks outwards; the shortest arrows are innermost.

    ``ends``: the last row that each source's arrows reach.
    """
    lanes: dict[Block, int] = {}
    for source in sorted(ends, key=lambda source: ends[source] - source.row):
        taken = {
            lane
            for other, lane in lanes.items()
            if other.row <= ends[source] and source.row <= ends[other]
        }
        lanes[source] = next(lane for lane in count() if lane not in taken)
    return lanes


def _past(source: Block, target: Block, lane: float) -> Curve:
    """From a block's lower half to the left, down in the lane, and to another's upper half."""
    start, end = source.y + source.height / 5, target.y - target.height / 5
    points = (
        (source.left, start),
        (lane + CORNER, start),
        (lane, start),
        (lane, start + CORNER),
        (lane, end - CORNER),
        (lane, end),
        (lane + CORNER, end),
        (target.left, end),
    )
    corner = (Curve.CURVE3, Curve.CURVE3)
    return Curve(points, [Curve.MOVETO, Curve.LINETO, *corner, Curve.LINETO, *corner, Curve.LINETO])


def _arrow(axes: Axes, curve: Curve) -> None:
    axes.add_patch(
        FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=7, color=FAINT, linewidth=1)
    )


# ---- the stage -----------------------------------------------------------------------------------

TEXTS: Final = {"table": format_table, "json": format_json}
PICTURES: Final = ("svg", "png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("name", metavar="NAME", choices=NETWORKS, help="of a network")
    parser.add_argument("--format", choices=(*TEXTS, *PICTURES), default="table")
    parser.add_argument(
        "--out", type=Path, help="file; without it, text is printed and a picture is NAME.FORMAT"
    )


def main(args: argparse.Namespace) -> int:
    """Print the description, or write it into a file."""
    structure = describe(args.name)
    if args.format in PICTURES:
        path = args.out or Path(f"{args.name}.{args.format}")
        # Text stays text, and the same network gives the same file: no date, no random ids.
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": args.name}):
            draw(args.name, structure).savefig(
                path, format=args.format, dpi=150, metadata={"Date": None}
            )
        print(path)
        return 0
    text = TEXTS[args.format](args.name, structure)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")
        print(args.out)
    return 0
