"""The data path of every peer: Pillow, ONNX Runtime or PyTorch, `F.interpolate`, Pillow.

It is what a competent user of these libraries would write. Two choices favour the peers. They pad
to the model's listed shapes instead of one square, which would always batch but has a third more
pixels. A batch of photos with different shapes runs one shape after the other. Where masks are
compared, the peers resize as the service does. That is faster than Pillow, and a sixth of the
values round to the level next to Pillow's, which changes up to 1 % of a mask.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from PIL import Image

from service.artefact import voc
from service.artefact.preprocessing import Geometry, preprocess

Engine = Literal[
    "onnx", "context-bf16", "torchvision-fp32", "null-logits", "null-mask", "decoded-only"
]
"""A network: an ONNX file; our architecture in torch's bf16 autocast; torchvision's fcn_resnet50
layout in torch; or a null network that returns stored logits or the finished mask, with
"decoded-only" for a photo that is decoded and nothing else."""

SHAPES: Final = (
    *(shape for side in (288, 352, 384) for shape in ((side, 512), (512, side))),
    (512, 512),
)
"""The listed shapes of the default artefact's contract."""

WORKING_SIZE: Final = 512
PADDING_COLOR: Final = (124, 116, 104)

_VARIABLE: Final = "BENCHMARK_PEER"


@dataclass(frozen=True, slots=True)
class Options:
    """A peer's network and the settings of its framework.

    ``model`` is an ONNX file, or for the null engines a ``.npz`` with ``logits`` and ``mask`` of
    the only photo that is sent. ``threads`` is per worker; ``batch`` 1 means no batching.
    """

    engine: Engine
    model: str
    workers: int
    threads: int
    batch: int
    wait_ms: float = 5.0

    def to_environment(self) -> dict[str, str]:
        """The environment variable for the peer's process."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Self:
        """Read the options in the peer's process."""
        return cls(**json.loads(os.environ[_VARIABLE]))


@dataclass(frozen=True, slots=True)
class Prepared:
    """The network's input, ``(h, w, 3) uint8``, and the photo's original and resized size."""

    pixels: npt.NDArray[np.uint8]
    photo: tuple[int, int]
    resized: tuple[int, int]


Network = Callable[[npt.NDArray[np.uint8]], torch.Tensor]
"""``(N, h, w, 3) uint8`` RGB to ``(N, 21, h/stride, w/stride)`` logits."""


class Pipeline:
    """The steps from a request's bytes to the answer's bytes."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        self._mask: npt.NDArray[np.uint8] | None = None
        if options.engine in {"null-mask", "decoded-only"}:
            self._mask = np.load(options.model)["mask"]
        else:
            self._network = _open(options)

    def predict(self, batch: Sequence[Prepared]) -> list[npt.NDArray[np.uint8]]:
        """Masks in the photos' original sizes, in the photos' order."""
        if self._mask is not None:
            return [self._mask] * len(batch)
        order = sorted(range(len(batch)), key=lambda index: batch[index].pixels.shape)
        masks: dict[int, npt.NDArray[np.uint8]] = {}
        for _, group in groupby(order, key=lambda index: batch[index].pixels.shape):
            members = list(group)
            logits = self._network(np.stack([batch[index].pixels for index in members]))
            for index, one in zip(members, logits, strict=True):
                masks[index] = upsample(one, batch[index])
        return [masks[index] for index in range(len(batch))]

    def __call__(self, data: bytes) -> bytes:
        """Run all steps for one photo."""
        (mask,) = self.predict([decode(data)])
        return to_png(mask)


def to_png(mask: npt.NDArray[np.uint8]) -> bytes:
    """A palette PNG with Pillow's defaults."""
    image = Image.fromarray(mask)
    image.putpalette(voc.FULL_PALETTE.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def decode(data: bytes) -> Prepared:
    """JPEG bytes to the padded input."""
    return prepare(Image.open(io.BytesIO(data)))


def prepare(image: Image.Image) -> Prepared:
    """Bring the longest side to 512 and pad to a listed shape."""
    image = image.convert("RGB")
    if _engine() == "decoded-only":
        return Prepared(np.asarray(image), image.size[::-1], image.size[::-1])
    scale = WORKING_SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    shape = next(one for one in SHAPES if height <= one[0] and width <= one[1])
    pixels = np.full((*shape, 3), PADDING_COLOR, dtype=np.uint8)
    # As users do: only for null networks, which ignore pixels.
    if _engine() in {"null-logits", "null-mask"}:
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    else:
        geometry = Geometry((image.height, image.width), (height, width), (height, width))
        resized = preprocess(np.asarray(image), geometry, PADDING_COLOR)
    pixels[:height, :width] = resized
    return Prepared(pixels, (image.height, image.width), (height, width))


@cache
def _engine() -> Engine | None:
    """The peer's engine; None in a process that is no peer."""
    return Options.from_environment().engine if _VARIABLE in os.environ else None


def upsample(logits: torch.Tensor, prepared: Prepared) -> npt.NDArray[np.uint8]:
    """``(21, h, w)`` logits of the padded input to the photo's class ids.

    One interpolation directly to the photo's size, at the resized photo's scale, so that the
    padding is cut off at the edges. The layout is channels_last, which takes a fifth of the time of
    the default layout, most of it in the argmax.
    """
    (height, width), (resized_height, resized_width) = prepared.photo, prepared.resized
    stride = prepared.pixels.shape[0] / logits.shape[1]
    # Slightly more, so that rounding never drops the last row.
    scale = (
        height * stride / resized_height * (1 + 1e-9),
        width * stride / resized_width * (1 + 1e-9),
    )
    rows = min(logits.shape[1], int(resized_height / stride) + 2)
    columns = min(logits.shape[2], int(resized_width / stride) + 2)
    large = F.interpolate(
        logits[None, :, :rows, :columns].float().contiguous(memory_format=torch.channels_last),
        scale_factor=scale,
        mode="bilinear",
        align_corners=False,
        recompute_scale_factor=False,
    )
    mask: npt.NDArray[np.uint8] = large[0, :, :height, :width].argmax(dim=0).to(torch.uint8).numpy()
    return mask


def _open(options: Options) -> Network:
    match options.engine:
        case "onnx":
            settings = ort.SessionOptions()
            settings.intra_op_num_threads = options.threads
            session = ort.InferenceSession(options.model, settings)
            return lambda batch: torch.from_numpy(session.run(["logits"], {"image": batch})[0])
        case "null-logits":
            logits = torch.from_numpy(np.load(options.model)["logits"])
            return lambda batch: logits.expand(len(batch), -1, -1, -1)
        case engine:
            from tests.benchmarks.peers import networks

            return networks.build(engine)
