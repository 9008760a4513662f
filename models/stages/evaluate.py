r"""Score a checkpoint, an artefact or a running service at the photos' own resolution.

    python -m models evaluate --artifact models/artifacts/context_fcn_resnet50_8s \
        --data VOCdevkit --split val --out evaluation

Prints the table and writes ``evaluation.json``, the charts ``per_class_iou.png`` and
``boundary_iou.png``, and two sheets of photo, truth and prediction into ``--out``:
``contact_sheet.png`` of a random choice and ``worst.png`` of the ten photos of lowest mean IoU.

``--protocol`` says how a photo is brought to the network: as the service does, or as
mmsegmentation or Keras-FCN do, to compare with what they publish.
"""

from __future__ import annotations

import argparse
import io
import json
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from models.checkpoint import load_network
from models.dataset import Sample, read_split
from models.graphs.network_file import FILES
from models.metrics import (
    BAND_WIDTHS,
    ConfusionMatrix,
    bootstrap_intervals,
    confusion_by_ring,
    mean_iou,
)
from models.prediction import (
    SHAPES,
    Predict,
    onnx_infer,
    open_device,
    predict_as_keras_fcn,
    predict_as_mmseg,
    predict_photo,
    predictions,
    torch_infer,
)
from service.artefact.manifest import sha256_of
from service.artefact.voc import CLASSES, FULL_PALETTE, IGNORE_INDEX

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

PUBLISHED_PROTOCOLS: Final[dict[str, Callable[..., NDArray[np.uint8]]]] = {
    "mmseg": predict_as_mmseg,
    "keras-fcn": predict_as_keras_fcn,
}
BOUNDARY_WIDTH: Final = 8
"""Pixels: the one of `BAND_WIDTHS` whose mean IoU stands beside the whole image's."""

SHEET_ROWS = 10
SHEET_SEED = 0
CONFUSIONS_SHOWN = 3
REFERENCES = (
    # Published on VOC's own 1,449 val images: not the same set as any part of them.
    ("article behind this project (AtrousFCN_Resnet50_16s)", 0.5859, 0.9033),
    ("Keras-FCN, trained on VOC's train list alone", 0.5606, None),
)


class EvaluationError(Exception):
    """What was asked for cannot be scored, or the service did not answer as it should."""


def service_predict(url: str) -> Predict:
    """Return predictions by ``POST {url}/segment``, photos sent as lossless PNG.

    The returned function raises `EvaluationError` when the service cannot be reached, refuses,
    or answers with a mask of another size.
    """
    if not url.startswith(("http://", "https://")):
        raise EvaluationError(f"{url}: expected http:// or https://")

    def predict(image: Image.Image) -> NDArray[np.uint8]:
        body = io.BytesIO()
        image.save(body, format="PNG", compress_level=1)
        request = urllib.request.Request(  # noqa: S310  (the scheme is checked above)
            f"{url.rstrip('/')}/segment",
            data=body.getvalue(),
            headers={"Content-Type": "image/png", "Accept": "image/png"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                mask = Image.open(io.BytesIO(response.read()))
        except (OSError, ValueError) as exc:
            raise EvaluationError(f"{request.full_url}: {exc}") from exc
        if mask.mode != "P" or mask.size != image.size:
            raise EvaluationError(f"{request.full_url}: mask is {mask.mode} {mask.size}")
        return np.asarray(mask)

    return predict


def open_predictor(args: argparse.Namespace) -> tuple[Predict, dict[str, str]]:
    """Return what is to be scored, and how the report names it.

    Raises:
        EvaluationError: a running service is to follow another protocol than its own.
    """
    if args.url:
        if args.protocol != "service":
            raise EvaluationError(
                f"--protocol {args.protocol} needs --checkpoint or --artifact: "
                "a running service has a protocol of its own"
            )
        return service_predict(args.url), {"url": args.url}
    if args.checkpoint:
        network, recipe = load_network(args.checkpoint)
        device = open_device(args.device)
        infer = torch_infer(network.to(device), device)
        size, stride, shapes = recipe.working_size, network.stride, SHAPES
        path, source = args.checkpoint, "checkpoint"
    else:
        path = args.artifact / FILES[args.precision]
        source = "artifact"
        infer, contract = onnx_infer(path)
        size, stride, shapes = contract.working_size, contract.stride, contract.shapes
    as_service = partial(predict_photo, working_size=size, shapes=shapes)
    predict_as = PUBLISHED_PROTOCOLS.get(args.protocol, as_service)
    predict = partial(predict_as, infer=infer, stride=stride)
    return predict, {"source": source, "sha256": sha256_of(path)}


def summarise(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Return the metrics as JSON values; what has no pixel to be measured on is None.

    Args:
        counts: ``(N, len(BAND_WIDTHS) + 1, 21, 21)``, `confusion_by_ring` of each image.
    """
    images = counts.sum(axis=1)
    matrix = ConfusionMatrix(images.sum(axis=0))
    interval, class_intervals = bootstrap_intervals(images)
    bands = mean_iou(counts.sum(axis=0).cumsum(axis=0)[:-1])
    by_width = dict(zip(BAND_WIDTHS, map(_or_none, bands), strict=True))
    return {
        # What the manifest takes over.
        "metrics": {
            "miou": matrix.mean_iou(),
            "pixel_accuracy": matrix.pixel_accuracy(),
            "mean_accuracy": matrix.mean_accuracy(),
            "frequency_weighted_iou": matrix.frequency_weighted_iou(),
            "per_class_iou": dict(zip(CLASSES, map(_or_none, matrix.iou()), strict=True)),
        },
        "miou_interval": interval.tolist(),
        "per_class_iou_interval": {
            name: None if np.isnan(ends).any() else ends.tolist()
            for name, ends in zip(CLASSES, class_intervals.T, strict=True)
        },
        "boundary_miou": by_width[BOUNDARY_WIDTH],
        "boundary_miou_by_width": by_width,
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def describe_image(name: str, counts: NDArray[np.int64]) -> dict[str, Any]:
    """Return an image's mean IoU, and which classes were taken for which, the most pixels first.

    Args:
        name: of the image.
        counts: ``(21, 21)``, its confusion matrix, with a pixel at least.
    """
    wrong = counts * ~np.eye(len(CLASSES), dtype=bool)
    most = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS_SHOWN]
    return {
        "name": name,
        "miou": float(mean_iou(counts)),
        "confused": [
            {
                "truth": CLASSES[truth],
                "prediction": CLASSES[prediction],
                "fraction": float(wrong[truth, prediction] / counts.sum()),
            }
            for truth, prediction in (divmod(int(pair), len(CLASSES)) for pair in most)
            if wrong[truth, prediction]
        ],
    }


def worst_first(images: NDArray[np.int64]) -> list[int]:
    """Return the indices of the images by mean IoU over the classes in truth or prediction.

    Args:
        images: ``(N, 21, 21)``, the confusion matrix of each image; those without a known pixel
            are left out.
    """
    scores = mean_iou(images)
    order = np.argsort(scores, kind="stable")
    return [int(index) for index in order if not np.isnan(scores[index])]


def format_table(report: dict[str, Any]) -> str:
    """Return the report as text, with published figures beside it."""
    metrics, (low, high) = report["metrics"], report["miou_interval"]
    lines = [f"{'class':<14}{'IoU':>8}   95 % interval"]
    for name, iou in metrics["per_class_iou"].items():
        ends = report["per_class_iou_interval"][name]
        lines.append(f"{name:<14}{_shown(iou):>8}   " + " to ".join(map(_shown, ends or [None])))
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
    for name, miou, accuracy in (scores, *REFERENCES):
        lines.append(f"{name:<54}{_shown(miou):>8}{_shown(accuracy):>8}")
    lines.append("Published figures are of VOC's own val list; the image sets differ.")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def draw_classes(report: dict[str, Any], path: Path) -> None:
    """Draw the per-class IoU as bars in VOC's colours, best first, with their intervals."""
    metrics, (low, high) = report["metrics"], report["miou_interval"]
    entries = [
        (iou, name, report["per_class_iou_interval"][name])
        for name, iou in metrics["per_class_iou"].items()
        if iou is not None
    ]
    entries.sort()
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    axes.axvspan(low, high, color="0.9")
    axes.axvline(metrics["miou"], color="0.4", linestyle="--", linewidth=1)
    for row, (iou, name, (lower, upper)) in enumerate(entries):
        axes.barh(row, iou, color=FULL_PALETTE[CLASSES.index(name)] / 255)
        # A white rim, because the bars are of any colour.
        for color, width in (("white", 3.5), ("0.25", 1.2)):
            axes.hlines(row, lower, upper, color=color, linewidth=width)
        axes.text(max(iou, upper) + 0.015, row, f"{iou:.2f}", va="center")
    axes.set_yticks(range(len(entries)), [name for _, name, _ in entries])
    title = f"mean IoU {metrics['miou']:.4f}, 95 % interval {low:.4f} to {high:.4f}"
    axes.set(xlim=(0, 1.08), xlabel="IoU; lines: 95 % intervals", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_boundaries(report: dict[str, Any], path: Path) -> None:
    """Draw the mean IoU near boundaries over the width of the band, and the whole image's."""
    values = [np.nan if v is None else v for v in report["boundary_miou_by_width"].values()]
    whole = report["metrics"]["miou"]
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_sheet(
    predict: Predict,
    samples: Sequence[Sample],
    images: NDArray[np.int64],
    chosen: Sequence[int],
    path: Path,
) -> None:
    """Draw photo, truth and prediction of the chosen samples, a row each, with its mean IoU.

    Args:
        predict: is asked for each of them once more.
        samples: the whole set.
        images: ``(N, 21, 21)``, the confusion matrix of each sample.
        chosen: indices of samples.
        path: the PNG to write.
    """
    figure = plt.figure(figsize=(11, 2.9 * len(chosen)), layout="constrained")
    rows = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    for row, index in zip(rows, chosen, strict=True):
        image, mask = samples[index].load()
        truth, prediction = np.asarray(mask), predict(image)
        described = describe_image(samples[index].name, images[index])
        row.suptitle(caption(described), x=0.01, ha="left", fontsize="medium")
        panels = row.subplots(1, 4, width_ratios=(1, 1, 1, 0.4))
        pictures = (np.asarray(image), FULL_PALETTE[truth], FULL_PALETTE[prediction])
        for panel, picture in zip(panels, pictures, strict=False):
            panel.imshow(picture)
        for panel in panels:
            panel.axis("off")
        shown = [i for i in np.union1d(truth, prediction) if i != IGNORE_INDEX]
        patches = [Patch(color=FULL_PALETTE[i] / 255, label=CLASSES[i]) for i in shown]
        panels[3].legend(handles=patches, loc="center left", frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def caption(described: dict[str, Any]) -> str:
    """Return what `describe_image` found as one line; a confusion of half a percent or more."""
    confused = ", ".join(
        f"{pair['truth']} → {pair['prediction']} {pair['fraction']:.0%}"
        for pair in described["confused"]
        if pair["fraction"] >= 0.005
    )
    line = f"{described['name']}, mean IoU {described['miou']:.2f}."
    return f"{line} Truth → prediction: {confused}" if confused else line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path)
    what.add_argument("--artifact", type=Path, help="folder of network.onnx")
    what.add_argument("--url", help="of a running service, such as http://localhost:8000")
    parser.add_argument("--data", type=Path, required=True, help="VOCdevkit, or its VOC2012")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder")
    parser.add_argument("--device", default="cpu", help="for --checkpoint")
    parser.add_argument("--precision", choices=FILES, default="fp32", help="for --artifact")
    parser.add_argument(
        "--protocol",
        choices=("service", *PUBLISHED_PROTOCOLS),
        default="service",
        help="how a photo is brought to the network; with --url the service's own only",
    )


def main(args: argparse.Namespace) -> int:
    """Score, print the table, and write JSON, charts and sheets."""
    samples = read_split(args.data, args.split)
    predict, source = open_predictor(args)
    progress = tqdm(samples, unit="images", disable=None)
    pairs = predictions(predict, progress)
    counts = np.stack([confusion_by_ring(truth, prediction) for truth, prediction in pairs])
    images = counts.sum(axis=1)
    ranking = worst_first(images)
    worst = ranking[:SHEET_ROWS]
    scored = {"protocol": args.protocol, "split": args.split, "images": len(samples)}
    report = {
        **source,
        **scored,
        **summarise(counts),
        "worst": [describe_image(samples[index].name, images[index]) for index in worst],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2) + "\n"
    (args.out / "evaluation.json").write_text(text, encoding="utf-8")
    draw_classes(report, args.out / "per_class_iou.png")
    draw_boundaries(report, args.out / "boundary_iou.png")
    random = np.random.default_rng(SHEET_SEED).permutation(ranking)[:SHEET_ROWS]
    for chosen, name in ((sorted(random), "contact_sheet.png"), (worst, "worst.png")):
        draw_sheet(predict, samples, images, chosen, args.out / name)
    print(format_table(report))
    print(f"\nwritten to {args.out}")
    return 0
