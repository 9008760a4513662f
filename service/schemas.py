"""The JSON response bodies as pydantic models. OpenAPI includes them."""

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
    """The model that segmented the photo."""

    name: str
    version: str


class Rle(Schema):
    """COCO's compressed run lengths, in pycocotools' format."""

    size: tuple[int, int] = Field(description="height, width in pixels")
    counts: str


class SegmentedClass(Schema):
    """A class that is present in the photo."""

    id: int
    name: str
    color: Color = Field(description="RGB")
    pixels: int
    fraction: float = Field(description="share of the photo's pixels, 0 to 1")
    bbox: tuple[int, int, int, int] = Field(description="x, y, w, h in pixels")
    confidence: float = Field(
        description="mean softmax probability of the class over its pixels, 0 to 1"
    )
    rle: Rle | None = Field(None, description="with mask=rle")
    polygons: list[list[float]] | None = Field(
        None,
        description="with mask=polygons: one ring `[x, y, x, y, ...]` in pixels per connected "
        "region, largest first; bridges join holes to it. Filled even-odd, as COCO's tools do, the "
        "IoU with the class's mask is at least 98 %. Only the 1000 largest outlines are kept",
    )


class Segmentation(Schema):
    """A photo's segmentation: the classes that are present, most pixels first."""

    width: int
    height: int
    model: ModelName
    classes: list[SegmentedClass]
    mask: str | None = Field(None, description="with mask=png: base64 of the palette PNG")
    timing_ms: dict[str, float] = Field(description="milliseconds per stage")


class ClassLabel(Schema):
    """One entry of the label map."""

    id: int
    name: str
    color: Color = Field(description="RGB")


class LabelMap(Schema):
    """A model's classes."""

    classes: list[ClassLabel]
    ignore_index: int = Field(description="value of void pixels in training masks; never served")


class ListedView(Schema):
    """One entry of the list of views."""

    name: str = Field(description="value of `view=`")
    description: str
    media_types: list[str] = Field(description="encodings, the default first")
    parameters: list[str] = Field(description="names of the parameters that the view reads")


class ViewList(Schema):
    """All views."""

    views: list[ListedView]


class ModelDescription(Schema):
    """The default model."""

    name: str
    version: str
    network: str
    file: str
    sha256: str
    precision: Precision
    provider: str = Field(description="ONNX Runtime's execution provider in use")
    stride: int
    working_size: int = Field(description="pixels of the longest side without max_side")
    shapes: tuple[Shape, ...] = Field(description="height, width that photos are padded to")
    accuracy: Accuracy | None = Field(description="measured with this file")
    data: dict[str, object]
    licences: dict[str, str]
    created: date


class ListedModel(Schema):
    """One entry of the list of models."""

    name: str = Field(description="value of `model=`")
    version: str
    default: bool
    loaded: bool = Field(description="whether it is in memory; if not, the next request loads it")
    accuracy: dict[Precision, Accuracy] = Field(description="measured, by precision")


class ModelList(Schema):
    """All served models, the default first."""

    models: list[ListedModel]


class Health(Schema):
    """Liveness or readiness."""

    status: str


class ParameterProblem(Schema):
    """The error of one parameter."""

    parameter: str
    message: str


class ErrorMessage(Schema):
    """An error in the format of the Open Inference, Hugging Face and Label Studio protocols."""

    error: str


class Problem(Schema):
    """An error: problem details by RFC 9457."""

    type: str = Field(description="stable identifier of the problem type")
    title: str
    status: int
    detail: str
    instance: str = Field(description="path of the request")
    request_id: str
    available: list[str] | None = Field(None, description="with 406: the available media types")
    errors: list[ParameterProblem] | None = Field(None, description="with 422: invalid parameters")


class BatchItem(Schema):
    """One image of a batch: its segmentation, or its problem."""

    index: int = Field(description="position in the request, from 0")
    name: str = Field(description="file name in the request")
    segmentation: Segmentation | None = None
    problem: Problem | None = None


class BatchEntry(Schema):
    """One image of an archive's index: its file, or its problem."""

    index: int = Field(description="position in the request, from 0")
    name: str = Field(description="file name in the request")
    file: str | None = Field(None, description="name of its file in the archive")
    problem: Problem | None = None


class BatchIndex(Schema):
    """``index.json`` of an archive."""

    model: ModelName
    images: list[BatchEntry]
