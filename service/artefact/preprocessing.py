"""A photo to the network's input, and the geometry that maps back to the photo's pixels.

The photo is scaled so that its longest side is the working size, then padded at the bottom and on
the right to a listed shape. Evaluation and calibration use this module too, because a difference of
one level in 255 can move pixels from one class to another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.artefact.contract import SHAPE_MULTIPLE, Shape

try:
    import cykooz_resizer  # type: ignore[import-untyped]
except ImportError:  # no wheel for this platform
    cykooz_resizer = None

Box = tuple[float, float, float, float]
"""``(left, top, right, bottom)`` in pixels, possibly fractional."""

BAND_BYTES: Final = 2**21
"""Bytes of an image that are resized at once. The resizer copies its input twice, and all of it
should stay in a core's cache: 8192x6144 pixels take a fifth of the time in bands."""


class Geometry(NamedTuple):
    """The place of a photo's pixels in the network's input. Sizes are ``(height, width)`` pixels.

    ``photo`` is the photo's size, ``resized`` its size after scaling, ``padded`` the size of the
    network's input, whose top left ``resized`` part is the photo.
    """

    photo: Shape
    resized: Shape
    padded: Shape

    @classmethod
    def plan(cls, photo: Shape, max_side: int, shapes: Iterable[Shape]) -> Self:
        """Plan for a photo of size ``photo`` whose longest side becomes ``max_side``.

        ``shapes`` are the contract's listed shapes, ascending by area; the first that contains
        the resized photo is used. If none does, both sides are rounded up to a multiple of 32.
        """
        height, width = photo
        scale = max_side / max(height, width)
        resized = max(1, round(height * scale)), max(1, round(width * scale))
        for shape in shapes:
            if resized[0] <= shape[0] and resized[1] <= shape[1]:
                return cls(photo, resized, shape)
        return cls(photo, resized, (round_up(resized[0]), round_up(resized[1])))


def preprocess(
    image: npt.NDArray[np.uint8],
    geometry: Geometry,
    padding_color: tuple[int, int, int],
    box: Box | None = None,
) -> npt.NDArray[np.uint8]:
    """Resize and pad a photo to the network's input.

    ``image``: ``(H, W, 3) uint8`` RGB, the photo itself or a smaller copy of it; ``box``: the part
    of ``image`` that is the photo (None: all of it). Returns ``(h, w, 3) uint8`` RGB of size
    ``geometry.padded``, contiguous; it may be read-only, or ``image`` itself. The filter is
    Pillow's ``BILINEAR``, which antialiases when it shrinks; rounding differs, so that some values
    are one level of 255 off Pillow's, very few two.
    """
    height, width = geometry.resized
    if geometry.resized == geometry.padded:
        return np.ascontiguousarray(_resize(image, geometry.resized, box))
    padded = np.empty((*geometry.padded, 3), dtype=np.uint8)
    padded[:height, :width] = _resize(image, geometry.resized, box)
    # Whole lines: NumPy is slow where the last of many broadcast axes has only three values.
    line = np.empty((geometry.padded[1], 3), dtype=np.uint8)
    line[:] = padding_color
    padded[height:] = line
    padded[:height, width:] = line[width:]
    return padded


def _resize(image: npt.NDArray[np.uint8], size: Shape, box: Box | None) -> npt.NDArray[np.uint8]:
    height, width, _ = image.shape
    whole = (0.0, 0.0, float(width), float(height))
    left, top, right, bottom = whole if box is None else box
    if size == (height, width) and (left, top, right, bottom) == whole:
        return image
    if cykooz_resizer is None:
        picture = Image.fromarray(image).resize(
            (size[1], size[0]), Image.Resampling.BILINEAR, (left, top, right, bottom)
        )
        return np.asarray(picture)
    # Bands of rows are faster to copy, but a few rows of a very wide photo are all of it.
    along = 0 if width <= 3 * height else 1
    low, high = (top, bottom) if along == 0 else (left, right)
    scale = (high - low) / size[along]
    # Each pixel is the mean of at most this many of the image's before and after its own part.
    margin = math.ceil(max(1, scale) / 2) + 1
    step = max(1, int(BAND_BYTES / (3 * image.shape[1 - along] * scale)))
    bands = []
    for start in range(0, size[along], step):
        stop = min(start + step, size[along])
        first = low + start * scale
        last = high if stop == size[along] else low + stop * scale
        before = max(0, math.floor(first) - margin)
        after = min(image.shape[along], math.ceil(last) + margin)
        if along == 0:
            part = left, first - before, right, last - before
            bands.append(_resize_band(image[before:after], (stop - start, size[1]), part))
        else:
            part = first - before, top, last - before, bottom
            bands.append(_resize_band(image[:, before:after], (size[0], stop - start), part))
    return bands[0] if len(bands) == 1 else np.concatenate(bands, axis=along)


def _resize_band(image: npt.NDArray[np.uint8], size: Shape, box: Box) -> npt.NDArray[np.uint8]:
    height, width, _ = image.shape
    left, top, right, bottom = box
    rgb = cykooz_resizer.PixelType.U8x3
    source = cykooz_resizer.ImageData(width, height, rgb, image.tobytes())
    resized = cykooz_resizer.ImageData(size[1], size[0], rgb)
    options = cykooz_resizer.ResizeOptions(
        resize_alg=cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.bilinear),
        crop_box=cykooz_resizer.CropBox(left, top, right - left, bottom - top),
        use_alpha=False,
    )
    # One resizer per call: it releases the interpreter's lock and is not thread-safe.
    cykooz_resizer.Resizer().resize(source, resized, options)
    return np.frombuffer(resized.get_buffer(), dtype=np.uint8).reshape(*size, 3)


def round_up(size: int) -> int:
    """``size`` in pixels, rounded up to a multiple of `SHAPE_MULTIPLE`."""
    return -(-size // SHAPE_MULTIPLE) * SHAPE_MULTIPLE
