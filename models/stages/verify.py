r"""Compare a checkpoint in PyTorch with its networks in ONNX Runtime; fail below the gates.

python -m models verify --checkpoint runs/cpu/checkpoint.pt --data VOCdevkit \
        --artifact models/artifacts/context_fcn_resnet50_8s --out parity.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models.checkpoint import load_network
from models.dataset import Sample, read_split
from models.errors import StageError
from models.graphs.network_file import NETWORK_FILES
from models.metrics import ConfusionMatrix
from models.prediction import Infer, onnx_infer, predict_photo, torch_infer
from models.transforms import fit, upsample
from service.artefact.files import replace_file
from service.artefact.preprocessing import Geometry

MIN_PIXEL_AGREEMENT = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.98}
MAX_MEAN_IOU_LOSS = {"fp32": 0.0005, "fp16": 0.0005, "int8": 0.005}
WORKING_SIZES = (320, 512, 640)
"""Three sizes of the longest side; with both orientations, at least six shapes."""
BATCH_SIZES = (1, 4)


class VerificationError(StageError):
    """The checkpoint and a network cannot be compared; the message names the network."""


def compare_shapes(
    reference: Infer, exported: Infer, samples: Sequence[Sample], stride: int
) -> list[dict[str, Any]]:
    """Compare both networks on batches of several shapes.

    Returns:
        One record per shape and batch size: the largest difference of a logit, and the share of
        pixels whose class agrees at the photos' own size.
    """
    records = []
    loaded = [sample.load()[0] for sample in samples]
    for size in WORKING_SIZES:
        groups: dict[tuple[int, ...], list[tuple[NDArray[np.uint8], Geometry]]] = {}
        for image in loaded:
            padded, geometry = fit(image, size, shapes=())
            groups.setdefault(padded.shape, []).append((padded, geometry))
        group = max(groups.values(), key=len)
        for batch_size in BATCH_SIZES:
            members = [group[i % len(group)] for i in range(batch_size)]
            batch = np.stack([padded for padded, _ in members])
            ours, theirs = reference(batch), exported(batch)
            agree = torch.cat(
                [
                    (upsample(a, g, stride).argmax(0) == upsample(b, g, stride).argmax(0)).flatten()
                    for a, b, (_, g) in zip(ours, theirs, members, strict=True)
                ]
            )
            records.append(
                {
                    "shape": list(batch.shape[1:3]),
                    "batch": batch_size,
                    "max_logit_difference": float((ours - theirs).abs().max()),
                    "pixel_agreement": float(agree.double().mean()),
                }
            )
    return records


def compare_set(
    reference: Infer,
    exported: Mapping[str, Infer],
    samples: Sequence[Sample],
    working_size: int,
    stride: int,
    classes: int,
) -> dict[str, Any]:
    """Score every network on a set and compare all pixels of every photo.

    Returns:
        The mean IoU of ``torch`` and of each precision, and the share of pixels on which each
        precision agrees with ``torch``.
    """
    infers = {"torch": reference, **exported}
    matrices = {name: ConfusionMatrix.empty(classes) for name in infers}
    agreeing = dict.fromkeys(exported, 0)
    total = 0
    for sample in tqdm(samples, unit="images", disable=None):
        image, mask = sample.load()
        masks = {
            name: predict_photo(image, infer, working_size=working_size, stride=stride, shapes=())
            for name, infer in infers.items()
        }
        for name, prediction in masks.items():
            matrices[name].update(np.asarray(mask), prediction)
        for name in exported:
            agreeing[name] += int((masks[name] == masks["torch"]).sum())
        total += masks["torch"].size
    return {
        "images": len(samples),
        "mean_iou": {name: matrix.mean_iou() for name, matrix in matrices.items()},
        "pixel_agreement": {name: count / total for name, count in agreeing.items()},
    }


def passes(shapes: Sequence[dict[str, Any]], whole: dict[str, Any]) -> bool:
    """Return whether every comparison passes its precision's gates."""
    agreement = dict(whole["pixel_agreement"])
    agreement["fp32"] = min(agreement["fp32"], *(r["pixel_agreement"] for r in shapes))
    mean_iou = whole["mean_iou"]
    return all(
        agreement[precision] >= MIN_PIXEL_AGREEMENT[precision]
        and mean_iou["torch"] - mean_iou[precision] <= MAX_MEAN_IOU_LOSS[precision]
        for precision in agreement
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, help="only the first N images of the split")
    parser.add_argument("--out", type=Path, required=True, help="report, JSON")


def main(args: argparse.Namespace) -> int:
    """Compare, write the report, and return 1 below a gate."""
    network, recipe, labels = load_network(args.checkpoint)
    reference, stride = torch_infer(network, torch.device("cpu")), network.stride
    networks: dict[str, Infer] = {}
    for precision, name in NETWORK_FILES.items():
        path = args.artifact / name
        if precision == "fp32" or path.exists():
            networks[precision], contract = onnx_infer(path)
            if contract.labels != labels:
                raise VerificationError(f"{path}: its label set differs from the checkpoint's")
    samples = read_split(args.data, args.split, labels)[: args.limit]
    first = samples[: max(BATCH_SIZES) * 4]
    shapes = compare_shapes(reference, networks["fp32"], first, stride)
    whole = compare_set(reference, networks, samples, recipe.working_size, stride, len(labels))
    passed = passes(shapes, whole)
    report = {
        "passed": passed,
        "min_pixel_agreement": MIN_PIXEL_AGREEMENT,
        "max_mean_iou_loss": MAX_MEAN_IOU_LOSS,
        "split": args.split,
        "set": whole,
        "shapes": shapes,
    }
    text = json.dumps(report, indent=2)
    replace_file(args.out, f"{text}\n".encode())
    print(text)
    return 0 if passed else 1
