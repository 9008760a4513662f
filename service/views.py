"""What a caller can have of a photo, and how it is made of the photo's labels."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from service.artefact import voc
from service.errors import InvalidParameter, NotAcceptable
from service.images.encoding import (
    MAX_SIDES,
    ImageFormat,
    cutout,
    encode_grey,
    encode_image,
    encode_mask,
    limit_classes,
    overlay,
)
from service.images.polygons import trace_polygons
from service.images.runs import Runs
from service.inference.upsampling import Labels
from service.schemas import ModelName, Rle, Segmentation, SegmentedClass

View = Literal["mask", "overlay", "cutout", "confidence"]
MaskFormat = Literal["rle", "png", "polygons", "none"]
MediaType = Literal["image/png", "image/jpeg", "image/webp", "application/json"]

MEDIA_TYPES: Final[dict[View, tuple[MediaType, ...]]] = {
    "mask": ("image/png", "application/json"),
    "overlay": ("image/png", "image/jpeg", "image/webp", "application/json"),
    "cutout": ("image/png", "image/webp", "application/json"),
    "confidence": ("image/png", "application/json"),
}
"""What each view can be answered as, the default first."""

IMAGE_FORMATS: Final[dict[MediaType, ImageFormat]] = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
}

_FOREGROUND: Final = frozenset(range(1, voc.NUM_CLASSES))


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller wants to have of a photo.

    ``classes`` are the ids that any view is limited to (None: all, but of a cut-out all except
    background); ``max_side`` the longest side the network sees, in pixels (None: the contract's
    working size); ``alpha`` the weight of an overlay's colours in [0, 1]; ``mask`` how JSON carries
    the mask; ``model`` the name of the model (None: the default).
    """

    view: View = "mask"
    media_type: MediaType = "image/png"
    alpha: float = 0.5
    classes: frozenset[int] | None = None
    max_side: int | None = None
    mask: MaskFormat = "rle"
    model: str | None = None

    @property
    def wants_confidence(self) -> bool:
        """Whether the answer says how sure the network is."""
        return self.view == "confidence" or self.media_type == "application/json"

    @property
    def shows_photo(self) -> bool:
        """Whether the answer holds the photo's own pixels."""
        return self.view in ("overlay", "cutout") and self.media_type != "application/json"

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise `NotAcceptable` if the answer's format cannot hold a photo of ``(H, W)`` pixels."""
        image_format = IMAGE_FORMATS.get(self.media_type)
        if image_format is not None and max(size) > MAX_SIDES[image_format]:
            able = [
                one
                for one in MEDIA_TYPES[self.view]
                if one not in IMAGE_FORMATS or max(size) <= MAX_SIDES[IMAGE_FORMATS[one]]
            ]
            raise NotAcceptable(
                f"{self.media_type} holds at most {MAX_SIDES[image_format]} pixels along a side, "
                f"and this photo has {max(size)}",
                tuple(able),
            )


def class_ids(names: Iterable[str]) -> frozenset[int]:
    """The ids of classes by their names. Raises `InvalidParameter`."""
    ids = set()
    for name in names:
        if name.strip() not in voc.CLASSES:
            raise InvalidParameter(
                f"classes: no class {name.strip()!r}; there are {', '.join(voc.CLASSES)}"
            )
        ids.add(voc.CLASSES.index(name.strip()))
    return frozenset(ids)


def encode_answer(
    photo: npt.NDArray[np.uint8] | None,
    labels: Labels,
    options: Options,
    model: ModelName,
    timing_ms: dict[str, float],
) -> bytes:
    """The answer of ``options.media_type``.

    ``photo``: ``(H, W, 3) uint8`` RGB, None unless the options show it; ``timing_ms``: the stages
    so far.
    """
    if options.media_type == "application/json":
        return _describe(labels, options, model, timing_ms)
    if options.view == "cutout" and photo is not None:
        chosen = _FOREGROUND if options.classes is None else options.classes
        return encode_image(cutout(photo, labels.mask, chosen), IMAGE_FORMATS[options.media_type])
    if options.view == "confidence" and labels.confidence is not None:
        confidence = labels.confidence
        if options.classes is not None:
            confidence = np.where(
                np.isin(labels.mask, sorted(options.classes)), confidence, np.uint8(0)
            )
        return encode_grey(confidence)
    mask = _limited(labels.mask, options)
    if photo is None:
        return encode_mask(mask, voc.FULL_PALETTE)
    return encode_image(
        overlay(photo, mask, voc.FULL_PALETTE, options.alpha), IMAGE_FORMATS[options.media_type]
    )


def _limited(mask: npt.NDArray[np.uint8], options: Options) -> npt.NDArray[np.uint8]:
    return mask if options.classes is None else limit_classes(mask, options.classes)


def _describe(
    labels: Labels, options: Options, model: ModelName, timing_ms: dict[str, float]
) -> bytes:
    started = time.perf_counter()
    height, width = labels.mask.shape
    # Of the whole mask: limiting the classes must not turn the others into background pixels.
    runs = Runs.of(labels.mask)
    confidence = labels.class_confidence()
    present = [
        found
        for found in runs.statistics()
        if options.classes is None or found.class_id in options.classes
    ]
    rings: dict[int, list[list[float]]] = {}
    if options.mask == "polygons":
        rings = trace_polygons(labels.mask, runs, [found.class_id for found in present])
    classes = [
        SegmentedClass(
            id=found.class_id,
            name=voc.CLASSES[found.class_id],
            color=voc.rgb(found.class_id),
            pixels=found.pixels,
            fraction=found.pixels / (height * width),
            bbox=found.bbox,
            confidence=float(confidence[found.class_id]),
            rle=Rle(size=(height, width), counts=runs.rle(found.class_id))
            if options.mask == "rle"
            else None,
            polygons=rings.get(found.class_id),
        )
        for found in present
    ]
    png = None
    if options.mask == "png":
        png = base64.b64encode(
            encode_mask(_limited(labels.mask, options), voc.FULL_PALETTE)
        ).decode()
    encode_ms = (time.perf_counter() - started) * 1000
    body = Segmentation(
        width=width,
        height=height,
        model=model,
        classes=classes,
        mask=png,
        timing_ms={
            stage: round(value, 3) for stage, value in [*timing_ms.items(), ("encode", encode_ms)]
        },
    )
    # The forms that were not asked for would be null in every class; `mask` stays, null or not.
    absent = {"rle", "polygons"} - {options.mask}
    exclude: Any = {"classes": {"__all__": absent}}
    return body.model_dump_json(exclude=exclude).encode()
