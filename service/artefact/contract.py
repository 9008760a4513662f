"""What an exported model promises to whoever serves it; shared by both halves.

The contract travels in the ONNX file's ``metadata_props``, one entry per field under the prefix
``fcn.``: text as it is, everything else as JSON, so that ``netron`` shows it readably::

    fcn.schema_version = 1
    fcn.name           = atrous_fcn_resnet50_16s
    fcn.mean           = [0.485, 0.456, 0.406]
    fcn.shapes         = [[384, 512], [512, 384], [512, 512]]

The graph itself takes ``image`` and gives ``logits``; `ModelContract.check_graph` says exactly
which. Casting and normalisation are inside the graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.artefact import voc
from service.errors import ContractError

SCHEMA_VERSION: Final = 1
METADATA_PREFIX: Final = "fcn."
INPUT_NAME: Final = "image"
OUTPUT_NAME: Final = "logits"
SHAPE_MULTIPLE: Final = 32
"""Listed shapes and fallback shapes are multiples of this many pixels in both directions."""

Precision = Literal["fp32", "fp16", "int8"]
Shape = tuple[int, int]
"""``(height, width)`` in pixels."""
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class TensorInfo(Protocol):
    """One input or output of a graph, in ONNX Runtime's words (its ``NodeArg``)."""

    @property
    def name(self) -> str:
        """Name in the graph."""

    @property
    def type(self) -> str:
        """Type, such as ``tensor(uint8)``."""

    @property
    def shape(self) -> Sequence[int | str | None]:
        """Dimensions; a symbol or None where one is dynamic."""


class ModelContract(BaseModel):
    """What varies between models, immutable.

    ``mean`` and ``std`` are RGB in [0, 1] units; the graph applies them, they are kept because
    `padding_color` is the mean. ``shapes`` are the ``(height, width)`` pixel shapes that requests
    are padded to, ascending by area. ``metrics`` are fractions such as ``val_miou``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    version: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._+-]+$")
    network: str = Field(min_length=1)
    stride: Literal[1, 2, 4, 8, 16, 32]
    classes: tuple[str, ...] = voc.CLASSES
    mean: tuple[UnitInterval, UnitInterval, UnitInterval]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    color_order: Literal["RGB"] = "RGB"
    working_size: int = Field(ge=SHAPE_MULTIPLE, description="pixels of the longest side")
    working_size_rule: Literal["longest_side"] = "longest_side"
    shapes: tuple[Shape, ...] = Field(min_length=1)
    precision: Precision
    metrics: dict[str, float] = {}

    @field_validator("classes")
    @classmethod
    def _classes_are_vocs(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(classes) != voc.NUM_CLASSES:
            raise ValueError(f"{len(classes)} classes, but VOC has {voc.NUM_CLASSES}")
        for index, (ours, vocs) in enumerate(zip(classes, voc.CLASSES, strict=True)):
            if ours != vocs:
                raise ValueError(f"class {index} is {ours!r}, but VOC's is {vocs!r}")
        return classes

    @field_validator("shapes")
    @classmethod
    def _shapes_are_listed_ascending(cls, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        for height, width in shapes:
            if min(height, width) <= 0 or height % SHAPE_MULTIPLE or width % SHAPE_MULTIPLE:
                raise ValueError(f"{height}x{width} is not a multiple of {SHAPE_MULTIPLE}")
        areas = [height * width for height, width in shapes]
        if areas != sorted(areas) or len(set(shapes)) != len(shapes):
            raise ValueError("shapes must be distinct and ascending by area")
        return shapes

    @property
    def padding_color(self) -> tuple[int, int, int]:
        """RGB in [0, 255]: the mean colour, which normalises to about zero."""
        red, green, blue = (round(value * 255) for value in self.mean)
        return red, green, blue

    def to_metadata(self) -> dict[str, str]:
        """The contract as ONNX ``metadata_props``; `from_metadata` reads it back unchanged."""
        fields = self.model_dump(mode="json")
        return {
            METADATA_PREFIX + key: value if isinstance(value, str) else json.dumps(value)
            for key, value in fields.items()
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Read the contract from ONNX ``metadata_props``; entries of other tools are ignored.

        Raises `ContractError`, one line that names the missing or wrong key and what differs.
        """
        found = metadata.get(METADATA_PREFIX + "schema_version")
        if found is not None and found != str(SCHEMA_VERSION):
            raise ContractError(
                f"{METADATA_PREFIX}schema_version is {found!r}, but this service reads "
                f"{SCHEMA_VERSION}"
            )
        fields: dict[str, object] = {}
        missing = []
        for key, info in cls.model_fields.items():
            text = metadata.get(METADATA_PREFIX + key)
            if text is None:
                missing.append(METADATA_PREFIX + key)
            elif info.annotation is str or key in _TEXT_FIELDS:
                fields[key] = text
            else:
                try:
                    fields[key] = json.loads(text)
                except json.JSONDecodeError as exc:
                    raise ContractError(f"{METADATA_PREFIX}{key} is not JSON: {text!r}") from exc
        if missing:
            raise ContractError(f"the graph's metadata lacks {', '.join(missing)}")
        try:
            return cls.model_validate(fields)
        except ValidationError as exc:
            raise ContractError(METADATA_PREFIX + one_line(exc)) from exc

    def check_graph(self, inputs: Iterable[TensorInfo], outputs: Iterable[TensorInfo]) -> None:
        """Compare the promise with the graph's own inputs and outputs.

        Wanted: one input ``image`` uint8 ``[N, h, w, 3]`` RGB, one output ``logits`` float32
        ``[N, 21, h/stride, w/stride]``; ``N``, ``h`` and ``w`` dynamic. The stride cannot be read
        from symbolic dimensions: the session's warm-up checks it on every listed shape.

        Raises `ContractError` with one line that says what differs.
        """
        _check_tensor("input", inputs, INPUT_NAME, "tensor(uint8)", (None, None, None, 3))
        _check_tensor(
            "output", outputs, OUTPUT_NAME, "tensor(float)", (None, len(self.classes), None, None)
        )


_TEXT_FIELDS: Final = {"color_order", "working_size_rule", "precision"}


def one_line(error: ValidationError) -> str:
    """The first complaint of a pydantic error as ``field: message``, without its URL."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    got = first.get("input")
    if first["type"] not in {"missing", "value_error"} and isinstance(got, (str, int, float)):
        message += f", got {got!r}"
    return f"{where}: {message}" if where else message


def _check_tensor(
    role: str,
    tensors: Iterable[TensorInfo],
    name: str,
    dtype: str,
    dimensions: tuple[int | None, ...],
) -> None:
    found = list(tensors)
    if [tensor.name for tensor in found] != [name]:
        names = ", ".join(repr(tensor.name) for tensor in found) or "none"
        raise ContractError(f"the graph's {role} should be {name!r} alone, but is {names}")
    tensor = found[0]
    if tensor.type != dtype:
        raise ContractError(f"the graph's {role} {name!r} is {tensor.type}, not {dtype}")
    shape = list(tensor.shape)
    wanted = ", ".join("?" if size is None else str(size) for size in dimensions)
    fits = len(shape) == len(dimensions) and all(
        # A dynamic dimension is a symbol or None; a fixed one is an int and must be the wanted one.
        (not isinstance(got, int)) if size is None else got == size
        for got, size in zip(shape, dimensions, strict=True)
    )
    if not fits:
        raise ContractError(
            f"the graph's {role} {name!r} has shape {shape}, not [{wanted}] (? is dynamic)"
        )
