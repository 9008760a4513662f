"""The offline data path: from a photo to its mask through any network that returns logits.

Preprocessing is the service's. Upsampling is PyTorch's; tests compare it with the service's faster
one.
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
from PIL import Image
from torch import Tensor, nn

from models.dataset import Sample
from models.errors import StageError
from models.graphs.fp16 import with_rounding
from models.metrics import ConfusionMatrix
from models.transforms import fit, upsample
from service.artefact.contract import INPUT_NAME, OUTPUT_NAME, ModelContract

Infer = Callable[[NDArray[np.uint8]], Tensor]
"""``(N, h, w, 3) uint8 RGB`` -> ``(N, C, h/stride, w/stride) float32`` logits."""

Predict = Callable[[Image.Image], NDArray[np.uint8]]
"""RGB photo -> (H, W) uint8 class ids of its own size."""

SHAPES: tuple[tuple[int, int], ...] = (
    *((288, 512), (512, 288)),  # 16:9, video
    *((352, 512), (512, 352)),  # 3:2
    *((384, 512), (512, 384)),  # 4:3
    (512, 512),
)
"""(height, width) of the inputs listed by exported models: common aspect ratios of cameras."""


class DeviceError(StageError):
    """The requested device is not available."""


def open_device(name: str) -> torch.device:
    """Return the torch device called ``name``, such as ``cpu`` or ``cuda:1``.

    Raises:
        DeviceError: this machine has no such device.
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
        working_size: pixels of the longest side after resizing.
        stride: of the logits.
        shapes: the listed network inputs, (height, width).
    """
    padded, geometry = fit(image, working_size, shapes)
    logits = infer(padded[None])[0]
    return class_ids(upsample(logits, geometry, stride))


def class_ids(logits: Tensor) -> NDArray[np.uint8]:
    """Return the best class of each pixel: ``(C, H, W)`` float -> ``(H, W) uint8``."""
    return logits.argmax(0).to(torch.uint8).cpu().numpy()


def torch_infer(
    network: nn.Module,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Infer:
    """Wrap a network for `predict_photo`; the network is left in eval mode."""
    network.eval()

    def infer(batch: NDArray[np.uint8]) -> Tensor:
        image = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float()
        with torch.inference_mode(), autocast():
            logits: Tensor = network(image.contiguous(memory_format=torch.channels_last))
        return logits.float()

    return infer


def onnx_infer(path: Path) -> tuple[Infer, ModelContract]:
    """Load an exported network on the CPU, with its contract.

    The activations of an fp16 network are rounded as on a GPU: see `with_rounding`.

    Raises:
        ContractError: the graph has no contract or does not keep it.
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


def score(predict: Predict, samples: Iterable[Sample], classes: int) -> ConfusionMatrix:
    """Score predictions of that many classes at the photos' own resolution, in one matrix.

    Raises:
        DatasetError: an image or a mask is missing or wrong.
    """
    matrix = ConfusionMatrix.empty(classes)
    for truth, prediction in predictions(predict, samples):
        matrix.update(truth, prediction)
    return matrix
