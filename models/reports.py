"""An evaluation as tables, charts and sheets of photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from models.dataset import Sample
from models.metrics import BAND_WIDTHS, mean_iou
from models.prediction import Predict
from service.artefact.files import write_atomically
from service.artefact.labels import LabelSet
from service.artefact.voc import CLASSES, IGNORE_INDEX

CONFUSIONS_SHOWN = 3
REFERENCES = (
    # Published for VOC's own 1,449 val images; a part of them is another set.
    ("article behind this project (AtrousFCN_Resnet50_16s)", 0.5859, 0.9033),
    ("Keras-FCN, trained on VOC's train list alone", 0.5606, None),
)


def format_table(report: dict[str, Any]) -> str:
    """Return the report as text, for VOC's classes with published figures for comparison."""
    metrics, (low, high) = report["metrics"], report["miou_interval"]
    per_class = metrics["per_class_iou"]
    width = max(14, *(len(name) + 1 for name in per_class))
    lines = [f"{'class':<{width}}{'IoU':>8}   95 % interval"]
    for name, iou in per_class.items():
        ends = map(_shown, report["per_class_iou_interval"][name] or [None])
        lines.append(f"{name:<{width}}{_shown(iou):>8}   " + " to ".join(ends))
    lines += ["", f"{'miou':<24}{metrics['miou']:.4f}   {low:.4f} to {high:.4f}"]
    for key in ("pixel_accuracy", "mean_accuracy", "frequency_weighted_iou"):
        lines.append(f"{key:<24}{metrics[key]:.4f}")
    by_width = report["boundary_miou_by_width"]
    lines.append(f"{'boundary_miou':<24}{_shown(report['boundary_miou'])}")
    lines += ["", "pixels to a boundary  " + "".join(f"{width:>8}" for width in by_width)]
    lines.append("mIoU within them      " + "".join(f"{_shown(v):>8}" for v in by_width.values()))
    lines += ["", f"{'':<54}{'mIoU':>8}{'pixels':>8}"]
    ours = f"this, on {report['images']} images of {report['split']}, {report['protocol']}"
    scores = (ours, metrics["miou"], metrics["pixel_accuracy"])
    references = REFERENCES if tuple(per_class) == CLASSES else ()
    for name, miou, accuracy in (scores, *references):
        lines.append(f"{name:<54}{_shown(miou):>8}{_shown(accuracy):>8}")
    if references:
        lines.append("Published figures are for VOC's own val list; the image sets differ.")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def summarise_image(name: str, counts: NDArray[np.int64], labels: LabelSet) -> dict[str, Any]:
    """Return an image's mean IoU and its most frequent confusions, most pixels first.

    Args:
        name: of the image.
        counts: ``(C, C)``, its confusion matrix, with at least one pixel.
        labels: the classes.
    """
    wrong = counts * ~np.eye(len(labels), dtype=bool)
    most = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS_SHOWN]
    return {
        "name": name,
        "miou": float(mean_iou(counts)),
        "confused": [
            {
                "truth": labels.names[truth],
                "prediction": labels.names[prediction],
                "fraction": float(wrong[truth, prediction] / counts.sum()),
            }
            for truth, prediction in (divmod(int(pair), len(labels)) for pair in most)
            if wrong[truth, prediction]
        ],
    }


def caption(summary: dict[str, Any]) -> str:
    """Return the result of `summarise_image` as one line, with confusions from half a percent."""
    confused = ", ".join(
        f"{pair['truth']} → {pair['prediction']} {pair['fraction']:.0%}"
        for pair in summary["confused"]
        if pair["fraction"] >= 0.005
    )
    line = f"{summary['name']}, mean IoU {summary['miou']:.2f}."
    return f"{line} Truth → prediction: {confused}" if confused else line


def draw_classes(report: dict[str, Any], labels: LabelSet, path: Path) -> None:
    """Draw the per-class IoU as bars in the classes' colours, best first, with their intervals."""
    metrics, (low, high) = report["metrics"], report["miou_interval"]
    entries = [
        (iou, name, report["per_class_iou_interval"][name])
        for name, iou in metrics["per_class_iou"].items()
        if iou is not None
    ]
    entries.sort()
    figure = Figure(figsize=(7, max(6, 0.28 * len(entries))), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(low, high, color="0.9")
    axes.axvline(metrics["miou"], color="0.4", linestyle="--", linewidth=1)
    for row, (iou, name, (lower, upper)) in enumerate(entries):
        axes.barh(row, iou, color=labels.palette[labels.names.index(name)] / 255)
        # A white rim, because the bars have any colour.
        for color, width in (("white", 3.5), ("0.25", 1.2)):
            axes.hlines(row, lower, upper, color=color, linewidth=width)
        axes.text(max(iou, upper) + 0.015, row, f"{iou:.2f}", va="center")
    axes.set_yticks(range(len(entries)), [name for _, name, _ in entries])
    title = f"mean IoU {metrics['miou']:.4f}, 95 % interval {low:.4f} to {high:.4f}"
    axes.set(xlim=(0, 1.08), xlabel="IoU; lines: 95 % intervals", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, dpi=120)


def draw_boundaries(report: dict[str, Any], path: Path) -> None:
    """Draw the mean IoU near boundaries by width of the band, and the whole image's."""
    values = [np.nan if v is None else v for v in report["boundary_miou_by_width"].values()]
    whole = report["metrics"]["miou"]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(BAND_WIDTHS, values, marker="o", color="0.2")
    axes.axhline(whole, color="0.4", linestyle="--", linewidth=1)
    points = "offset points"
    for width, value in zip(BAND_WIDTHS, values, strict=True):
        axes.annotate(f"{value:.2f}", (width, value), (0, -15), textcoords=points, ha="center")
    axes.annotate(f"whole image {whole:.2f}", (1, whole), (0, 5), textcoords=points)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BAND_WIDTHS, [str(width) for width in BAND_WIDTHS])
    axes.set(ylim=(0, 1), xlabel="at most so many pixels from a boundary", ylabel="mean IoU")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, dpi=120)


def draw_sheet(
    predict: Predict,
    samples: Sequence[Sample],
    images: NDArray[np.int64],
    chosen: Sequence[int],
    path: Path,
) -> None:
    """Draw photo, truth, prediction and mean IoU of the chosen samples, one row each.

    Args:
        predict: called again for each of them.
        samples: the whole set.
        images: ``(N, C, C)``, the confusion matrix of each sample.
        chosen: indices of samples.
        path: the PNG to write.
    """
    figure = Figure(figsize=(11, 2.9 * len(chosen)), layout="constrained")
    rows = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    for row, index in zip(rows, chosen, strict=True):
        image, mask = samples[index].load()
        labels = samples[index].labels
        truth, prediction = np.asarray(mask), predict(image)
        summary = summarise_image(samples[index].name, images[index], labels)
        row.suptitle(caption(summary), x=0.01, ha="left", fontsize="medium")
        panels = row.subplots(1, 4, width_ratios=(1, 1, 1, 0.4))
        pictures = (np.asarray(image), labels.palette[truth], labels.palette[prediction])
        for panel, picture in zip(panels, pictures, strict=False):
            panel.imshow(picture)
        for panel in panels:
            panel.axis("off")
        shown = [i for i in np.union1d(truth, prediction) if i != IGNORE_INDEX]
        patches = [Patch(color=labels.palette[i] / 255, label=labels.names[i]) for i in shown]
        panels[3].legend(handles=patches, loc="center left", frameon=False)
    _save(figure, path, dpi=100)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG, whole or not at all."""
    with write_atomically(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
