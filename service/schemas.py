"""Response bodies of the JSON endpoints, as pydantic models; they make the OpenAPI page."""

from __future__ import annotations

from datetime import date

from pydantic import BaseModel, ConfigDict, Field

from service.artefact.contract import Precision, Shape
from service.artefact.manifest import Accuracy

Color = tuple[int, int, int]


class Schema(BaseModel):
    """Base of all response bodies: immutable."""

    model_config = ConfigDict(frozen=True)


class ModelName(Schema):
    """Which model answered."""

    name: str
    version: str


class Rle(Schema):
    """COCO's compressed run lengths, as pycocotools reads them."""

    size: tuple[int, int] = Field(description="height, width in pixels")
    counts: str


class SegmentedClass(Schema):
    """One class that is present in the photo."""

    id: int
    name: str
    color: Color = Field(description="RGB")
    pixels: int
    fraction: float = Field(description="of the photo's pixels, 0 to 1")
    bbox: tuple[int, int, int, int] = Field(description="x, y, w, h in pixels")
    confidence: float = Field(
        description="mean over the class's pixels of the winning softmax probability, 0 to 1"
    )
    rle: Rle | None = Field(None, description="with mask=rle")
    polygons: list[list[float]] | None = Field(
        None,
        description="with mask=polygons: a ring `[x, y, x, y, ...]` in pixels for each connected "
        "region, the largest first, holes cut to it by bridges; filled even-odd, as COCO's tools "
        "do, at least 98 % IoU with the class's mask. Of more than 1000 outlines the largest",
    )


class Segmentation(Schema):
    """A photo's segmentation: the classes present, most pixels first."""

    width: int
    height: int
    model: ModelName
    classes: list[SegmentedClass]
    mask: str | None = Field(None, description="base64 of the palette PNG, with mask=png")
    timing_ms: dict[str, float] = Field(description="milliseconds per stage")


class ClassLabel(Schema):
    """One entry of the label map."""

    id: int
    name: str
    color: Color = Field(description="RGB")


class LabelMap(Schema):
    """A model's classes."""

    classes: list[ClassLabel]
    ignore_index: int = Field(description="value of void pixels in masks to train on; never served")


class ListedView(Schema):
    """One way to answer."""

    name: str = Field(description="what `view=` takes")
    description: str
    media_types: list[str] = Field(description="what it is encoded as, the default first")
    parameters: list[str] = Field(description="names of the parameters that it reads")


class ViewList(Schema):
    """All views."""

    views: list[ListedView]


class ModelDescription(Schema):
    """The model that is being served."""

    name: str
    version: str
    network: str
    file: str
    sha256: str
    precision: Precision
    provider: str = Field(description="ONNX Runtime's execution provider in use")
    stride: int
    working_size: int = Field(description="pixels of the longest side unless max_side says else")
    shapes: tuple[Shape, ...] = Field(description="height, width that photos are padded to")
    accuracy: Accuracy | None = Field(description="measured with this file")
    data: dict[str, object]
    licences: dict[str, str]
    created: date


class ListedModel(Schema):
    """A model that is served."""

    name: str = Field(description="what `model=` takes")
    version: str
    default: bool
    loaded: bool = Field(description="whether it is in memory; else the first request loads it")
    accuracy: dict[Precision, Accuracy] = Field(description="measured, by precision")


class ModelList(Schema):
    """All models that are served, the default first."""

    models: list[ListedModel]


class Health(Schema):
    """Liveness or readiness."""

    status: str


class ParameterProblem(Schema):
    """What is wrong with one parameter."""

    parameter: str
    message: str


class ErrorMessage(Schema):
    """An error, as the clients of other services' protocols read it."""

    error: str


class Problem(Schema):
    """An error, as RFC 9457 describes problems."""

    type: str = Field(description="stable identifier of the kind of problem")
    title: str
    status: int
    detail: str
    instance: str = Field(description="path of the request")
    request_id: str
    available: list[str] | None = Field(None, description="with 406: the media types there are")
    errors: list[ParameterProblem] | None = Field(None, description="with 422: each parameter")


class BatchItem(Schema):
    """One image of a batch: its segmentation, or what was wrong with it."""

    index: int = Field(description="place among the images that were sent, from 0")
    name: str = Field(description="file name as it was sent")
    segmentation: Segmentation | None = None
    problem: Problem | None = None


class BatchEntry(Schema):
    """One image of a batch that is answered as an archive."""

    index: int = Field(description="place among the images that were sent, from 0")
    name: str = Field(description="file name as it was sent")
    file: str | None = Field(None, description="the answer's name in the archive")
    problem: Problem | None = None


class BatchIndex(Schema):
    """``index.json`` of an archive."""

    model: ModelName
    images: list[BatchEntry]
