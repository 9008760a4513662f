"""From a photo to its mask through any network that gives logits: the offline data path.

The service's preprocessing, and PyTorch's upsampling, which tests hold together with the service's
own, faster one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from PIL import Image
from torch import Tensor, nn

from models.dataset import Sample
from models.graphs.builder import GraphBuilder, attributes_of
from models.metrics import ConfusionMatrix
from models.transforms import fit, upsample
from service.artefact.contract import INPUT_NAME, OUTPUT_NAME, SHAPE_MULTIPLE, ModelContract
from service.artefact.preprocessing import Geometry

Infer = Callable[[NDArray[np.uint8]], Tensor]
"""``(N, h, w, 3) uint8 RGB`` -> ``(N, 21, h/stride, w/stride) float32`` logits."""

Predict = Callable[[Image.Image], NDArray[np.uint8]]
"""RGB photo -> (H, W) uint8 class ids of its own size."""

SHAPES: tuple[tuple[int, int], ...] = (
    *((288, 512), (512, 288)),  # 16:9, video
    *((352, 512), (512, 352)),  # 3:2
    *((384, 512), (512, 384)),  # 4:3
    (512, 512),
)
"""(height, width) of the network inputs that exported models list: cameras' aspect ratios."""


MMSEG_SCALE = (2048, 512)
"""Pixels that mmsegmentation's VOC configurations fit the longer and the shorter side into."""

KERAS_FCN_SIZE = 512
"""Side in pixels of the square that Keras-FCN pads photos to."""


class DeviceError(Exception):
    """The device that was asked for is not there."""


def open_device(name: str) -> torch.device:
    """Return the torch device called ``name``, such as ``cpu`` or ``cuda:1``.

    Raises:
        DeviceError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise DeviceError(f"device {name}: {str(exc).splitlines()[0]}") from exc
    return device


def predict_photo(
    image: Image.Image,
    infer: Infer,
    *,
    working_size: int,
    stride: int,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 class ids of a photo.

    Args:
        image: RGB.
        infer: the network.
        working_size: what the longest side is brought to, in pixels.
        stride: of the logits.
        shapes: the listed network inputs, (height, width).
    """
    padded, geometry = fit(image, working_size, shapes)
    logits = infer(padded[None])[0]
    return _labels(upsample(logits, geometry, stride))


def predict_as_mmseg(image: Image.Image, infer: Infer, *, stride: int) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 class ids of a photo as mmsegmentation tests on VOC 2012.

    The photo keeps its ratio and is as large as fits into `MMSEG_SCALE`; the logits are
    interpolated to that size and from there to the photo's (``align_corners=False``). Sources:
    ``configs/_base_/datasets/pascal_voc12.py``, ``EncoderDecoder.whole_inference``,
    ``mmcv.rescale_size``. Two things differ: the network's input is padded at the bottom and right
    to multiples of 32, and a photo that shrinks is antialiased (VOC's photos grow).
    """
    longer, shorter = max(image.size), min(image.size)
    scale = min(MMSEG_SCALE[0] / longer, MMSEG_SCALE[1] / shorter)
    padded, geometry = fit(image, int(longer * scale + 0.5), shapes=())
    logits = infer(padded[None])[0]
    unscaled = Geometry(geometry.resized, geometry.resized, geometry.padded)
    resized = upsample(logits, unscaled, stride)
    return _labels(upsample(resized, geometry, stride=1))


def predict_as_keras_fcn(image: Image.Image, infer: Infer, *, stride: int) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 class ids of a photo as Keras-FCN's ``inference.py`` does.

    The photo is not resized: it lies in the middle of a black square of `KERAS_FCN_SIZE`, from
    whose prediction it is cut out. VOC's photos fit; around a larger one, which Keras-FCN does
    not take, the square grows to the next multiples of 32.
    """
    height, width = image.height, image.width
    size = (max(KERAS_FCN_SIZE, _round_up(height)), max(KERAS_FCN_SIZE, _round_up(width)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    margins = ((top, size[0] - height - top), (left, size[1] - width - left), (0, 0))
    logits = infer(np.pad(np.asarray(image), margins)[None])[0]
    labels = _labels(upsample(logits, Geometry(size, size, size), stride))
    return labels[top : top + height, left : left + width]


def _round_up(side: int) -> int:
    return -(-side // SHAPE_MULTIPLE) * SHAPE_MULTIPLE


def _labels(logits: Tensor) -> NDArray[np.uint8]:
    return logits.argmax(0).to(torch.uint8).cpu().numpy()


def torch_infer(
    network: nn.Module,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Infer:
    """Wrap a network as `predict_photo` wants it; the network is left in eval mode."""
    network.eval()

    def infer(batch: NDArray[np.uint8]) -> Tensor:
        image = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float()
        with torch.inference_mode(), autocast():
            logits: Tensor = network(image.contiguous(memory_format=torch.channels_last))
        return logits.float()

    return infer


def onnx_infer(path: Path) -> tuple[Infer, ModelContract]:
    """Load an exported network on the CPU, with the contract that it carries.

    Of an fp16 network every activation is rounded as on a GPU: see `with_rounding`.

    Raises:
        ContractError: the graph holds no contract, or not the one it promises.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    contract = ModelContract.from_metadata(session.get_modelmeta().custom_metadata_map)
    contract.check_graph(session.get_inputs(), session.get_outputs())
    if contract.precision == "fp16":
        rounding = with_rounding(onnx.load(path)).SerializeToString()
        session = onnxruntime.InferenceSession(rounding, providers=["CPUExecutionProvider"])

    def infer(batch: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT_NAME], {INPUT_NAME: batch})[0])

    return infer, contract


def with_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an fp16 network in a form that ONNX Runtime's CPU does not compute more exactly.

    The CPU has few fp16 kernels. ONNX Runtime has it compute in fp32 between casts of its own,
    and then drops these wherever two meet, so that no activation is rounded. Casts that the graph
    itself holds it keeps: here each operator on fp16 becomes one on fp32, its result rounded to
    fp16. That is what tensor cores do, which add up in fp32; where a GPU's kernel holds several
    operators, it rounds less often.
    """
    graph = GraphBuilder("rounding.")
    halves = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16}
    for node in model.graph.node:
        (output,) = node.output
        if node.op_type == "Cast":
            graph.nodes.append(node)
            to_half = attributes_of(node)["to"] == TensorProto.FLOAT16
        elif to_half := not halves.isdisjoint(node.input):
            inputs = [
                graph.once("Cast", [name], to=TensorProto.FLOAT) if name in halves else name
                for name in node.input
            ]
            graph.emit("Cast", [graph.copy(node, inputs)], output, to=TensorProto.FLOAT16)
        else:
            graph.nodes.append(node)
        if to_half:
            halves.add(output)
    rounding = onnx.ModelProto()
    rounding.CopyFrom(model)
    del rounding.graph.node[:]
    rounding.graph.node.extend(graph.nodes)
    return rounding


def predictions(
    predict: Predict, samples: Iterable[Sample]
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield each sample's ``(truth, prediction)``, (H, W) uint8 at the photo's own resolution.

    Raises:
        DatasetError: an image or a mask is missing or wrong.
    """
    for sample in samples:
        image, mask = sample.load()
        yield np.asarray(mask), predict(image)


def score(predict: Predict, samples: Iterable[Sample]) -> ConfusionMatrix:
    """Score predictions at the photos' own resolution, in one confusion matrix.

    Raises:
        DatasetError: an image or a mask is missing or wrong.
    """
    matrix = ConfusionMatrix()
    for truth, prediction in predictions(predict, samples):
        matrix.update(truth, prediction)
    return matrix
