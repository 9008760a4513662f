r"""Score a checkpoint, an artefact or a running service at the photos' own resolution.

    python -m models evaluate --artifact models/artifacts/context_fcn_resnet50_8s \
        --data VOCdevkit --split val --out evaluation

Prints a table and writes ``evaluation.json``, the charts ``per_class_iou.png`` and
``boundary_iou.png``, and two sheets of photo, truth and prediction into ``--out``:
``contact_sheet.png`` of a random choice and ``worst.png`` of the ten photos with the lowest mean
IoU.

``--protocol`` selects how a photo is prepared for the network: as by the service, or as by
mmsegmentation or Keras-FCN, for comparison with their published figures.
"""

from __future__ import annotations

import argparse
import io
import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from models.checkpoint import load_network
from models.dataset import Sample, read_split, require_classes
from models.errors import StageError
from models.graphs.network_file import NETWORK_FILES
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
    predict_photo,
    predictions,
    torch_infer,
)
from models.published_protocols import predict_as_keras_fcn, predict_as_mmseg
from models.reports import (
    draw_boundaries,
    draw_classes,
    draw_sheet,
    format_table,
    summarise_image,
)
from service.artefact.files import replace_file, sha256_of
from service.artefact.labels import LabelSet

PUBLISHED_PROTOCOLS: Final[dict[str, Callable[..., NDArray[np.uint8]]]] = {
    "mmseg": predict_as_mmseg,
    "keras-fcn": predict_as_keras_fcn,
}
BOUNDARY_WIDTH: Final = 8
"""Pixels: the one of `BAND_WIDTHS` whose mean IoU is the headline figure."""

SHEET_ROWS = 10
SHEET_SEED = 0


class EvaluationError(StageError):
    """The options cannot be combined, or the service failed or gave an invalid response."""


def request_service(
    url: str, data: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """Return the body of a service's response to a GET request, or with ``data`` to a POST request.

    Raises:
        EvaluationError: the URL is not HTTP, or the service cannot be reached or refuses.
    """
    if not url.startswith(("http://", "https://")):
        raise EvaluationError(f"{url}: expected http:// or https://")
    request = urllib.request.Request(url, data, dict(headers or {}))  # noqa: S310  (checked above)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            body: bytes = response.read()
    except (OSError, ValueError) as exc:
        raise EvaluationError(f"{url}: {exc}") from exc
    return body


def service_labels(url: str) -> LabelSet:
    """Return the label set of a running service's model, from ``GET {url}/classes``.

    Raises:
        EvaluationError: the service cannot be reached, refuses, or returns no label set.
    """
    endpoint = f"{url.rstrip('/')}/classes"
    body = request_service(endpoint)
    try:
        found = json.loads(body)
        return LabelSet(
            names=[entry["name"] for entry in found["classes"]],
            colors=[entry["color"] for entry in found["classes"]],
            ignore_index=found["ignore_index"],
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise EvaluationError(f"{endpoint}: returned no label set: {exc!r}") from exc


def service_predict(url: str) -> Predict:
    """Return a predictor that sends photos to ``POST {url}/segment`` as lossless PNG.

    The predictor raises `EvaluationError` if the service cannot be reached, refuses the photo, or
    returns a mask of another size.
    """
    endpoint = f"{url.rstrip('/')}/segment"

    def predict(image: Image.Image) -> NDArray[np.uint8]:
        photo = io.BytesIO()
        image.save(photo, format="PNG", compress_level=1)
        headers = {"Content-Type": "image/png", "Accept": "image/png"}
        body = request_service(endpoint, photo.getvalue(), headers)
        try:
            mask = Image.open(io.BytesIO(body))
        except (OSError, ValueError) as exc:
            raise EvaluationError(f"{endpoint}: {exc}") from exc
        if mask.mode != "P" or mask.size != image.size:
            raise EvaluationError(f"{endpoint}: mask is {mask.mode} {mask.size}")
        return np.asarray(mask)

    return predict


def open_predictor(args: argparse.Namespace) -> tuple[Predict, LabelSet, dict[str, str]]:
    """Return the predictor to score, its label set, and its entries in the report.

    Raises:
        EvaluationError: ``--url`` is combined with another protocol than the service's, or the
            service does not return its label set.
    """
    if args.url:
        if args.protocol != "service":
            raise EvaluationError(
                f"--protocol {args.protocol} needs --checkpoint or --artifact: "
                "a running service has its own protocol"
            )
        return service_predict(args.url), service_labels(args.url), {"url": args.url}
    if args.checkpoint:
        network, recipe, labels = load_network(args.checkpoint)
        device = open_device(args.device)
        infer = torch_infer(network.to(device), device)
        size, stride, shapes = recipe.working_size, network.stride, SHAPES
        path, source = args.checkpoint, "checkpoint"
    else:
        path = args.artifact / NETWORK_FILES[args.precision]
        source = "artifact"
        infer, contract = onnx_infer(path)
        size, stride, shapes = contract.working_size, contract.stride, contract.shapes
        labels = contract.labels
    as_service = partial(predict_photo, working_size=size, shapes=shapes)
    predict_as = PUBLISHED_PROTOCOLS.get(args.protocol, as_service)
    predict = partial(predict_as, infer=infer, stride=stride)
    return predict, labels, {"source": source, "sha256": sha256_of(path)}


def count(
    predict: Predict, samples: Sequence[Sample], classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels of each image and of each ring, by (truth, prediction).

    Returns:
        ``(N, C, C)`` and ``(len(BAND_WIDTHS) + 1, C, C)`` int64. The rings are summed over the
        images: with 150 classes, the rings of each image would need 1.3 MB.
    """
    rings = np.zeros((len(BAND_WIDTHS) + 1, classes, classes), dtype=np.int64)
    images = np.zeros((len(samples), classes, classes), dtype=np.int64)
    progress = tqdm(samples, unit="images", disable=None)
    for index, (truth, prediction) in enumerate(predictions(predict, progress)):
        counts = confusion_by_ring(truth, prediction, classes)
        rings += counts
        images[index] = counts.sum(axis=0)
    return images, rings


def summarise(
    images: NDArray[np.int64], rings: NDArray[np.int64], labels: LabelSet
) -> dict[str, Any]:
    """Return the metrics as JSON values; a metric without pixels is None.

    Args:
        images: ``(N, C, C)``, the confusion matrix of each image.
        rings: ``(len(BAND_WIDTHS) + 1, C, C)``, the sum of each image's `confusion_by_ring`.
        labels: the C classes.
    """
    matrix = ConfusionMatrix(images.sum(axis=0))
    interval, class_intervals = bootstrap_intervals(images)
    bands = mean_iou(rings.cumsum(axis=0)[:-1])
    by_width = dict(zip(BAND_WIDTHS, map(_or_none, bands), strict=True))
    return {
        # The part that the manifest copies.
        "metrics": {
            "miou": matrix.mean_iou(),
            "pixel_accuracy": matrix.pixel_accuracy(),
            "mean_accuracy": matrix.mean_accuracy(),
            "frequency_weighted_iou": matrix.frequency_weighted_iou(),
            "per_class_iou": dict(zip(labels.names, map(_or_none, matrix.iou()), strict=True)),
        },
        "miou_interval": interval.tolist(),
        "per_class_iou_interval": {
            name: None if np.isnan(ends).any() else ends.tolist()
            for name, ends in zip(labels.names, class_intervals.T, strict=True)
        },
        "boundary_miou": by_width[BOUNDARY_WIDTH],
        "boundary_miou_by_width": by_width,
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def worst_first(images: NDArray[np.int64]) -> list[int]:
    """Return the indices of the images by mean IoU over the classes in truth or prediction.

    Args:
        images: ``(N, C, C)``, the confusion matrix of each image; images without a known pixel
            are left out.
    """
    scores = mean_iou(images)
    order = np.argsort(scores, kind="stable")
    return [int(index) for index in order if not np.isnan(scores[index])]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path)
    what.add_argument("--artifact", type=Path, help="folder of network.onnx")
    what.add_argument("--url", help="URL of a running service, such as http://localhost:8000")
    parser.add_argument("--data", type=Path, required=True, help="VOCdevkit, or its VOC2012")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="folder")
    parser.add_argument("--device", default="cpu", help="for --checkpoint")
    parser.add_argument("--precision", choices=NETWORK_FILES, default="fp32", help="for --artifact")
    parser.add_argument(
        "--protocol",
        choices=("service", *PUBLISHED_PROTOCOLS),
        default="service",
        help="how a photo is prepared for the network; only service with --url",
    )


def main(args: argparse.Namespace) -> int:
    """Score, print the table, and write JSON, charts and sheets."""
    predict, labels, source = open_predictor(args)
    samples = read_split(args.data, args.split, labels)
    images, rings = count(predict, samples, len(labels))
    known = images.sum(axis=(0, 2)) > 0
    require_classes(known, labels, f"the masks of {args.split}")
    ranking = worst_first(images)
    worst = ranking[:SHEET_ROWS]
    scored = {"protocol": args.protocol, "split": args.split, "images": len(samples)}
    report = {
        **source,
        **scored,
        **summarise(images, rings, labels),
        "worst": [summarise_image(samples[index].name, images[index], labels) for index in worst],
    }
    text = json.dumps(report, indent=2) + "\n"
    replace_file(args.out / "evaluation.json", text.encode())
    draw_classes(report, labels, args.out / "per_class_iou.png")
    draw_boundaries(report, args.out / "boundary_iou.png")
    random = np.random.default_rng(SHEET_SEED).permutation(ranking)[:SHEET_ROWS]
    for chosen, name in ((sorted(random), "contact_sheet.png"), (worst, "worst.png")):
        draw_sheet(predict, samples, images, chosen, args.out / name)
    print(format_table(report))
    print(f"\nwritten to {args.out}")
    return 0
