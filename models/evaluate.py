r"""Score a checkpoint, an artefact or a running service at the photos' own resolution.

    python -m models evaluate --artifact models/artifacts/context_fcn_resnet50_16s \
        --data VOCdevkit --split val --out evaluation

Writes ``evaluation.json``, ``per_class_iou.png`` and ``contact_sheet.png`` (photo, truth,
prediction) into ``--out`` and prints the table.
"""

from __future__ import annotations

import argparse
import io
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from models.checkpoint import load_network
from models.dataset import Sample, read_split
from models.metrics import ConfusionMatrix
from models.network_file import FILES
from models.prediction import (
    SHAPES,
    Predict,
    onnx_infer,
    open_device,
    predict_photo,
    score,
    torch_infer,
)
from service.manifest import sha256_of
from service.voc import CLASSES, FULL_PALETTE

mpl.use("Agg")
from matplotlib import pyplot as plt

SHEET_ROWS = 10
SHEET_SEED = 0
REFERENCES = (
    # Published on VOC's own 1,449 val images: not the same set as any part of them.
    ("article behind this project (AtrousFCN_Resnet50_16s)", 0.5859, 0.9033),
    ("Keras-FCN, trained on VOC's train list alone", 0.5606, None),
)


class EvaluationError(Exception):
    """The service that is to be scored did not answer as it should."""


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
    """Return what is to be scored, and how the report names it."""
    if args.url:
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
    return (
        lambda image: predict_photo(image, infer, working_size=size, stride=stride, shapes=shapes),
        {"source": source, "sha256": sha256_of(path)},
    )


def summarise(matrix: ConfusionMatrix) -> dict[str, Any]:
    """Return the metrics as JSON values; a class that never occurs has no IoU."""
    return {
        "miou": matrix.mean_iou(),
        "pixel_accuracy": matrix.pixel_accuracy(),
        "mean_accuracy": matrix.mean_accuracy(),
        "frequency_weighted_iou": matrix.frequency_weighted_iou(),
        "per_class_iou": {
            name: None if np.isnan(iou) else float(iou)
            for name, iou in zip(CLASSES, matrix.iou(), strict=True)
        },
    }


def format_table(metrics: dict[str, Any], images: int, split: str) -> str:
    """Return the metrics as text, with published figures beside them."""
    lines = [f"{'class':<14}{'IoU':>8}"]
    for name, iou in metrics["per_class_iou"].items():
        lines.append(f"{name:<14}{'-' if iou is None else f'{iou:.4f}':>8}")
    lines.append("")
    for key in ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou"):
        lines.append(f"{key:<24}{metrics[key]:.4f}")
    lines += ["", f"{'':<54}{'mIoU':>8}{'pixels':>8}"]
    lines.append(
        f"{f'this, on {images} images of {split}':<54}"
        f"{metrics['miou']:>8.4f}{metrics['pixel_accuracy']:>8.4f}"
    )
    for name, miou, accuracy in REFERENCES:
        shown = "-" if accuracy is None else f"{accuracy:.4f}"
        lines.append(f"{name:<54}{miou:>8.4f}{shown:>8}")
    lines.append("Published figures are of VOC's own val list; the image sets differ.")
    return "\n".join(lines)


def draw_chart(metrics: dict[str, Any], path: Path) -> None:
    """Draw the per-class IoU as horizontal bars in VOC's colours, best first."""
    entries = [(n, i) for n, i in metrics["per_class_iou"].items() if i is not None]
    entries.sort(key=lambda entry: entry[1])
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    names = [name for name, _ in entries]
    colors = [tuple(FULL_PALETTE[CLASSES.index(name)] / 255) for name in names]
    bars = axes.barh(names, [iou for _, iou in entries], color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(metrics["miou"], color="0.4", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1.05), xlabel="IoU", title=f"mean IoU {metrics['miou']:.4f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_contact_sheet(predict: Predict, samples: Sequence[Sample], path: Path) -> None:
    """Draw photo, truth and prediction of a fixed random choice of samples, a row each."""
    chosen = np.random.default_rng(SHEET_SEED).permutation(len(samples))[:SHEET_ROWS]
    figure, axes = plt.subplots(
        len(chosen), 3, figsize=(9, 2.6 * len(chosen)), layout="constrained", squeeze=False
    )
    for row, index in zip(axes, sorted(chosen), strict=True):
        image, mask = samples[index].load()
        panels = (
            (samples[index].name, np.asarray(image)),
            ("truth", FULL_PALETTE[np.asarray(mask)]),
            ("prediction", FULL_PALETTE[predict(image)]),
        )
        for axis, (title, pixels) in zip(row, panels, strict=True):
            axis.imshow(pixels)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


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


def main(args: argparse.Namespace) -> int:
    """Score, print the table, and write JSON, chart and contact sheet."""
    samples = read_split(args.data, args.split)
    predict, source = open_predictor(args)
    matrix = score(predict, tqdm(samples, unit="images", disable=None))
    metrics = summarise(matrix)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {**source, "split": args.split, "images": len(samples), "metrics": metrics}
    text = json.dumps(report, indent=2) + "\n"
    (args.out / "evaluation.json").write_text(text, encoding="utf-8")
    draw_chart(metrics, args.out / "per_class_iou.png")
    draw_contact_sheet(predict, samples, args.out / "contact_sheet.png")
    print(format_table(metrics, len(samples), args.split))
    print(f"\nwritten to {args.out}")
    return 0
