"""A tiny network that follows the model contract, and photos whose masks are known."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service.artefact import voc
from service.artefact.contract import ModelContract, Precision
from service.artefact.labels import VOC_LABELS, LabelSet
from service.artefact.manifest import FileEntry, Manifest, load_manifest

STRIDE = 16
SHAPES = ((64, 96), (96, 64), (96, 96))
WORKING_SIZE = 96

# Scaled so that the softmax of neighbouring colours is neither flat nor one-hot.
SCALE = 2000.0


def make_contract(**changes: object) -> ModelContract:
    """The tiny network's contract."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "version": "1",
        "network": "nearest_color",
        "stride": STRIDE,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "working_size": WORKING_SIZE,
        "shapes": SHAPES,
        "precision": "fp32",
    }
    return ModelContract(**{**fields, **changes})


def build_network(
    metadata: Mapping[str, str], stride: int = STRIDE, labels: LabelSet = VOC_LABELS
) -> onnx.ModelProto:
    """A graph that labels each cell of stride x stride pixels with its nearest class colour.

    The logits are minus the squared distance to each palette colour, without the term that is the
    same for all colours. That is linear: a 1x1 convolution after an average pool.
    """
    palette = np.array(labels.colors, dtype=np.float32)
    weight = (2 * palette / SCALE).reshape(-1, 3, 1, 1)
    bias = -(palette**2).sum(axis=1) / SCALE
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node(
                "AveragePool",
                ["planes"],
                ["cells"],
                kernel_shape=[stride, stride],
                strides=[stride, stride],
            ),
            helper.make_node("Conv", ["cells", "weight", "bias"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "h", "w", 3])],
        [
            helper.make_tensor_value_info(
                "logits", TensorProto.FLOAT, ["N", len(labels), "lh", "lw"]
            )
        ],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    network = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, producer_name="tests"
    )
    helper.set_model_props(network, dict(metadata))
    return network


def build_artefact(
    folder: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    stride: int = STRIDE,
    name: str = "tiny",
    version: str = "1",
    labels: LabelSet = VOC_LABELS,
) -> Path:
    """Write network and manifest; ``metadata`` and ``stride`` can make the two disagree."""
    folder.mkdir(parents=True, exist_ok=True)
    contract = make_contract(name=name, version=version, labels=labels)
    path = folder / "network.onnx"
    onnx.save(build_network(metadata or contract.to_metadata(), stride, labels), path)
    Manifest(
        name=contract.name,
        version=contract.version,
        files={path.name: FileEntry.of(path, contract.precision)},
        licences={"code": "Apache-2.0"},
        created=date(2026, 1, 1),
    ).write(folder)
    return folder


def add_precision(folder: Path, precision: Precision) -> None:
    """Add the same network to an artefact under another precision."""
    path = folder / f"network.{precision}.onnx"
    onnx.save(build_network(make_contract(precision=precision).to_metadata()), path)
    manifest = load_manifest(folder)
    files = {**manifest.files, path.name: FileEntry.of(path, precision)}
    manifest.model_copy(update={"files": files}).write(folder)


def paint(
    ids: npt.NDArray[np.uint8], cell: int = STRIDE, labels: LabelSet = VOC_LABELS
) -> npt.NDArray[np.uint8]:
    """Paint a ``(h, w)`` map of class ids as a ``(h*cell, w*cell, 3) uint8`` RGB photo."""
    big = ids.repeat(cell, axis=0).repeat(cell, axis=1)
    return labels.palette[big]


def encode(image: npt.NDArray[np.uint8], image_format: str = "PNG", **options: object) -> bytes:
    """Encode an image as a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, image_format, **options)
    return file.getvalue()


def two_class_photo() -> npt.NDArray[np.uint8]:
    """(64, 96, 3) uint8: a person in the right half, a cat below background in the left."""
    ids = np.zeros((4, 6), dtype=np.uint8)
    ids[1:, :2] = voc.CLASSES.index("cat")
    ids[:, 3:] = voc.CLASSES.index("person")
    return paint(ids)
