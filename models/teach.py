r"""Write a teacher's logits over the training photos, for `train --teacher`.

    python -m models teach --tflite deeplabv3_mnv2_pascal_quant.tflite \
        --data VOCdevkit --split trainaug --out runs/teacher

A teacher is an artefact of this project or a DeepLabv3 of Google Coral's model zoo; of several, an
ensemble, the logits are averaged. One ``<name>.npy`` per photo: ``(21, h, w) float16``, stretched
over the whole photo, the longest side in 64 cells.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ai_edge_litert.interpreter import Interpreter  # type: ignore[import-untyped]
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models.dataset import read_split
from models.network_file import FILES
from models.prediction import onnx_infer
from models.transforms import Geometry, fit, upsample
from service.voc import NUM_CLASSES

LONGEST_SIDE = 64
"""Cells: twice what a network of stride 16 has over a photo of 512 pixels."""

Teacher = Callable[[Image.Image, tuple[int, int]], Tensor]
"""RGB photo, (h, w) of the map wanted -> ``(21, h, w) float32`` logits."""


class TeacherError(Exception):
    """A teacher cannot be read or does not give VOC's logits; the message says why."""


def artifact_teacher(artifact: Path) -> Teacher:
    """Return an artefact's fp32 network as a teacher.

    Raises:
        ContractError: the graph holds no contract, or not the one it promises.
    """
    infer, contract = onnx_infer(artifact / FILES["fp32"])

    def teach(image: Image.Image, size: tuple[int, int]) -> Tensor:
        padded, geometry = fit(image, contract.working_size, contract.shapes)
        stretched = Geometry(photo=size, resized=geometry.resized)
        return upsample(infer(padded[None])[0], stretched, contract.stride)

    return teach


def tflite_teacher(path: Path) -> Teacher:
    """Return a quantised TensorFlow Lite network as a teacher: its argmax's input is what teaches.

    The photo's longest side is brought to the input's, the rest is mid-grey.

    Raises:
        TeacherError: the file cannot be read, or holds no argmax over 21 classes.
    """
    try:
        interpreter = Interpreter(str(path), experimental_preserve_all_tensors=True)
        interpreter.allocate_tensors()
    except (OSError, ValueError, RuntimeError) as exc:
        raise TeacherError(f"{path}: cannot be read: {exc}") from exc
    (source,) = interpreter.get_input_details()
    side = int(source["shape"][1])
    shape = [1, side, side, NUM_CLASSES]
    planes = [t for t in interpreter.get_tensor_details() if list(t["shape"]) == shape]
    if not planes:
        raise TeacherError(f"{path}: no logits of shape {shape} in it")
    scale, zero_point = planes[-1]["quantization"]

    def teach(image: Image.Image, size: tuple[int, int]) -> Tensor:
        factor = side / max(image.size)
        width, height = (max(1, round(length * factor)) for length in image.size)
        padded = np.full((1, side, side, 3), 128, dtype=np.uint8)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        padded[0, :height, :width] = np.asarray(resized)
        interpreter.set_tensor(source["index"], padded)
        interpreter.invoke()
        values = interpreter.get_tensor(planes[-1]["index"])[0, :height, :width]
        logits = (torch.from_numpy(values).float() - zero_point) * scale
        return F.adaptive_avg_pool2d(logits.permute(2, 0, 1), size)

    return teach


def map_size(image: Image.Image) -> tuple[int, int]:
    """Return (h, w) of a photo's map, in cells."""
    scale = LONGEST_SIDE / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return height, width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="folder")
    parser.add_argument("--tflite", type=Path, action="append", default=[], help="file")
    parser.add_argument("--data", type=Path, required=True, help="VOCdevkit, or its VOC2012")
    parser.add_argument("--split", default="trainaug")
    parser.add_argument("--out", type=Path, required=True, help="folder")


def main(args: argparse.Namespace) -> int:
    """Write the map of every photo that is not there yet."""
    teachers = [artifact_teacher(path) for path in args.artifact]
    teachers += [tflite_teacher(path) for path in args.tflite]
    if not teachers:
        raise TeacherError("give at least one --artifact or --tflite")
    args.out.mkdir(parents=True, exist_ok=True)
    for sample in tqdm(read_split(args.data, args.split), unit="images", disable=None):
        path = args.out / f"{sample.name}.npy"
        if path.exists():
            continue
        image, _ = sample.load()
        logits = torch.stack([teach(image, map_size(image)) for teach in teachers]).mean(dim=0)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, logits.half().numpy())
        temporary.replace(path)
    return 0
