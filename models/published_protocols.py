"""From a photo to its mask as other projects do it, for comparison with their published figures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.prediction import Infer, class_ids
from models.transforms import fit, upsample
from service.artefact.preprocessing import Geometry, round_up

MMSEG_SCALE = (2048, 512)
"""Largest longer and shorter side in mmsegmentation's VOC configurations, in pixels."""

KERAS_FCN_SIZE = 512
"""Side of the square that Keras-FCN pads photos to, in pixels."""


def predict_as_mmseg(image: Image.Image, infer: Infer, *, stride: int) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 class ids of a photo as mmsegmentation tests on VOC 2012.

    The photo is resized to the largest size within `MMSEG_SCALE`, at its own aspect ratio. The
    logits are interpolated to that size, then to the photo's (``align_corners=False``). Sources:
    ``configs/_base_/datasets/pascal_voc12.py``, ``EncoderDecoder.whole_inference``,
    ``mmcv.rescale_size``. Two things differ: the network's input is padded at the bottom and right
    to multiples of 32, and downscaling is antialiased (VOC's photos are upscaled).
    """
    longer, shorter = max(image.size), min(image.size)
    scale = min(MMSEG_SCALE[0] / longer, MMSEG_SCALE[1] / shorter)
    padded, geometry = fit(image, int(longer * scale + 0.5), shapes=())
    logits = infer(padded[None])[0]
    unscaled = Geometry(geometry.resized, geometry.resized, geometry.padded)
    resized = upsample(logits, unscaled, stride)
    return class_ids(upsample(resized, geometry, stride=1))


def predict_as_keras_fcn(image: Image.Image, infer: Infer, *, stride: int) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 class ids of a photo as Keras-FCN's ``inference.py`` does.

    The photo is not resized: it is centred in a black square of `KERAS_FCN_SIZE`, and its mask is
    cut out of the square's. VOC's photos fit. Keras-FCN refuses larger photos; here the square
    grows to the next multiples of 32.
    """
    height, width = image.height, image.width
    size = (max(KERAS_FCN_SIZE, round_up(height)), max(KERAS_FCN_SIZE, round_up(width)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    margins = ((top, size[0] - height - top), (left, size[1] - width - left), (0, 0))
    logits = infer(np.pad(np.asarray(image), margins)[None])[0]
    labels = class_ids(upsample(logits, Geometry(size, size, size), stride))
    return labels[top : top + height, left : left + width]
