"""The views of a segmented photo: a table, and a function that renders each of them.

To add a view, add its name to `ViewName`, its parameters to `Options` and its entry to `VIEWS`.
OpenAPI, ``GET /views``, the web page and the formats of ``fcn-segment predict`` use the table.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from service.artefact.contract import ModelContract
from service.errors import InvalidParameter, NotAcceptable
from service.images.encoding import (
    MAX_SIDES,
    Cutout,
    ImageFormat,
    Overlay,
    encode_grey,
    encode_image,
    encode_mask,
    limit_classes,
    look_up,
)
from service.images.polygons import trace_polygons
from service.images.runs import Runs
from service.inference.upsampling import Labels
from service.schemas import ModelName, Rle, Segmentation, SegmentedClass
from service.telemetry.timings import Timings

ViewName = Literal["mask", "overlay", "cutout", "confidence", "json"]
MaskFormat = Literal["rle", "png", "polygons", "none"]
MediaType = Literal["image/png", "image/jpeg", "image/webp", "application/json"]

JSON: Final[MediaType] = "application/json"
IMAGE_FORMATS: Final[dict[MediaType, ImageFormat]] = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
}
SUFFIXES: Final[dict[MediaType, str]] = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    JSON: ".json",
}

MIN_SIDE: Final = 64
"""The smallest ``max_side``, pixels: below it the logits have too few cells to be of use."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A segmented photo to render.

    ``labels``: at the photo's size; ``contract``: the model's; ``timings``: the stages so far;
    ``photo``: ``(H, W, 3) uint8`` RGB, None unless the view needs it.
    """

    labels: Labels
    contract: ModelContract
    timings: Timings = field(default_factory=Timings)
    photo: npt.NDArray[np.uint8] | None = None

    def require_photo(self) -> npt.NDArray[np.uint8]:
        """The photo. Raises `RuntimeError` if it is missing: the view's entry must need it."""
        if self.photo is None:
            raise RuntimeError("the scene has no photo: the view's entry needs needs_photo=True")
        return self.photo

    def require_confidence(self) -> npt.NDArray[np.uint8]:
        """``(H, W) uint8`` confidence. Raises `RuntimeError` as `require_photo` does."""
        if self.labels.confidence is None:
            raise RuntimeError(
                "the scene has no confidence: the view's entry needs needs_confidence=True"
            )
        return self.labels.confidence


@dataclass(frozen=True, slots=True)
class View:
    """One way to show a segmented photo.

    ``media_types``: its encodings, the default first; ``parameters``: the fields of `Options` that
    it reads beside `COMMON_PARAMETERS`; ``needs_photo`` and ``needs_confidence``: its needs;
    ``pixel_bytes``: for each encoding, the most memory for each pixel, beside the photo's, while it
    is written and sent, measured at 50 megapixels: mask, confidence, buffers, the answer twice.
    ``render(scene, options, media_type)`` returns the encoded view.
    """

    name: ViewName
    description: str
    media_types: tuple[MediaType, ...]
    render: Callable[[Scene, Options, MediaType], bytes]
    pixel_bytes: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    needs_photo: bool = False
    needs_confidence: bool = False

    @property
    def suffix(self) -> str:
        """The suffix of files in its default media type."""
        return SUFFIXES[self.media_types[0]]

    def check_size(self, size: tuple[int, int], media_type: MediaType) -> None:
        """Raise `NotAcceptable` if ``media_type`` cannot hold a photo of ``(H, W)`` pixels."""
        longest = max(size)
        if longest > _longest_side(media_type):
            raise NotAcceptable(
                f"{media_type} allows at most {_longest_side(media_type)} pixels along a side, "
                f"but this photo has {longest}",
                tuple(one for one in (*self.media_types, JSON) if longest <= _longest_side(one)),
            )


def _longest_side(media_type: MediaType) -> float:
    """The most pixels along a side that ``media_type`` can hold."""
    image_format = IMAGE_FORMATS.get(media_type)
    return float("inf") if image_format is None else MAX_SIDES[image_format]


# ---- rendering -----------------------------------------------------------------------------------


def _render_mask(scene: Scene, options: Options, _: MediaType) -> bytes:
    return encode_mask(_limited_mask(scene, options), scene.contract.labels.palette)


def _render_overlay(scene: Scene, options: Options, media_type: MediaType) -> bytes:
    mask = _limited_mask(scene, options)
    palette = scene.contract.labels.palette
    blended = Overlay(scene.require_photo(), mask, palette, options.alpha)
    return encode_image(blended, IMAGE_FORMATS[media_type])


def _render_cutout(scene: Scene, options: Options, media_type: MediaType) -> bytes:
    chosen = _chosen(scene, options)
    if chosen is None:
        chosen = scene.contract.labels.foreground
    cut = Cutout(scene.require_photo(), scene.labels.mask, chosen)
    return encode_image(cut, IMAGE_FORMATS[media_type])


def _render_confidence(scene: Scene, options: Options, _: MediaType) -> bytes:
    confidence, chosen = scene.require_confidence(), _chosen(scene, options)
    if chosen is not None:
        kept = np.zeros(256, dtype=np.uint8)
        kept[list(chosen)] = 255
        confidence = confidence & look_up(scene.labels.mask, kept)
    return encode_grey(confidence)


def _render_json(scene: Scene, options: Options, _: MediaType) -> bytes:
    scene.require_confidence()
    labels, label_set, chosen = scene.labels, scene.contract.labels, _chosen(scene, options)
    height, width = labels.mask.shape
    # Computed on the whole mask, so that unchosen classes do not count as background.
    runs = Runs.of(labels.mask)
    confidence = labels.class_confidence()
    present = [one for one in runs.statistics() if chosen is None or one.class_id in chosen]
    rings: dict[int, list[list[float]]] = {}
    if options.mask == "polygons":
        rings = trace_polygons(labels.mask, runs, [one.class_id for one in present])
    classes = [
        SegmentedClass(
            id=one.class_id,
            name=label_set.names[one.class_id],
            color=label_set.colors[one.class_id],
            pixels=one.pixels,
            fraction=one.pixels / (height * width),
            bbox=one.bbox,
            confidence=float(confidence[one.class_id]),
            rle=Rle(size=(height, width), counts=runs.rle(one.class_id))
            if options.mask == "rle"
            else None,
            polygons=rings.get(one.class_id),
        )
        for one in present
    ]
    png = None
    if options.mask == "png":
        png = base64.b64encode(_render_mask(scene, options, "image/png")).decode()
    body = Segmentation(
        width=width,
        height=height,
        model=ModelName(name=scene.contract.name, version=scene.contract.version),
        classes=classes,
        mask=png,
        timing_ms={stage: round(value, 3) for stage, value in scene.timings.ms().items()},
    )
    # Forms that were not requested would be null in every class; `mask` is always present.
    absent = {"rle", "polygons"} - {options.mask}
    exclude: Any = {"classes": {"__all__": absent}}
    return body.model_dump_json(exclude=exclude).encode()


def _chosen(scene: Scene, options: Options) -> frozenset[int] | None:
    """The ids of the classes that the view is limited to; None: all."""
    return None if options.classes is None else scene.contract.labels.ids(options.class_names)


def _limited_mask(scene: Scene, options: Options) -> npt.NDArray[np.uint8]:
    chosen = _chosen(scene, options)
    return scene.labels.mask if chosen is None else limit_classes(scene.labels.mask, chosen)


# ---- the table -----------------------------------------------------------------------------------

VIEWS: Final[dict[ViewName, View]] = {
    view.name: view
    for view in (
        View(
            "mask",
            "palette PNG of class ids",
            ("image/png",),
            _render_mask,
            pixel_bytes=(4,),
        ),
        View(
            "overlay",
            "the photo blended with the classes' colours",
            ("image/png", "image/jpeg", "image/webp"),
            _render_overlay,
            pixel_bytes=(8, 6, 12),
            parameters=("alpha",),
            needs_photo=True,
        ),
        View(
            "cutout",
            "the pixels of the chosen classes (default: all except background), transparent "
            "elsewhere",
            ("image/png", "image/webp"),
            _render_cutout,
            pixel_bytes=(8, 19),
            needs_photo=True,
        ),
        View(
            "confidence",
            "greyscale PNG of the softmax probability of each pixel's class in 255ths, 0 outside "
            "the chosen classes",
            ("image/png",),
            _render_confidence,
            pixel_bytes=(5,),
            needs_confidence=True,
        ),
        View(
            "json",
            "statistics and the mask of each class that is present",
            (JSON,),
            _render_json,
            pixel_bytes=(10,),
            parameters=("mask",),
            needs_confidence=True,
        ),
    )
}


COMMON_PARAMETERS: Final = ("classes", "max_side", "model")
"""The fields of `Options` that every view reads."""


class Options(BaseModel):
    """The parameters of a request to segment a photo.

    A parameter that the chosen view does not read has no effect.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    view: ViewName = Field(
        "mask",
        description=". ".join(f"`{view.name}`: {view.description}" for view in VIEWS.values())
        + ". `Accept: application/json` selects `json` in place of any other",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the colours in an overlay")
    classes: str | None = Field(
        None,
        description="comma-separated names of the classes that the view is limited to (default: "
        "all); `GET /classes` lists them",
    )
    max_side: int | None = Field(None, description="longest side that the network sees, pixels")
    mask: MaskFormat = Field(
        "rle",
        description="form of the mask in JSON: `rle`: COCO's run lengths, per class. "
        "`polygons`: COCO's polygons, per class. `png`: base64 of the palette PNG. `none`",
    )
    model: str | None = Field(
        None, description="name of a model that `GET /models` lists (default: the first)"
    )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in ``classes``."""
        return () if self.classes is None else tuple(self.classes.split(","))


def check_side(max_side: int | None, limit: int) -> None:
    """Raise `InvalidParameter` unless ``max_side`` is None or in `MIN_SIDE` to ``limit`` pixels."""
    if max_side is not None and not MIN_SIDE <= max_side <= limit:
        # Cut: JSON and URLs may have thousands of digits.
        raise InvalidParameter(f"max_side: {max_side!r:.20} is not in {MIN_SIDE} to {limit}")


def offers(name: ViewName) -> dict[MediaType, View]:
    """The media types that a request for a view can get, and their views, the default first.

    JSON is one of them for every view; the view ``json`` renders it.
    """
    view = VIEWS[name]
    return {**dict.fromkeys(view.media_types, view), JSON: VIEWS["json"]}
