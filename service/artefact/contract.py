"""The contract between an exported model and the service.

It is stored in the ONNX file's ``metadata_props``, one entry per field under the prefix ``fcn.``:
text unchanged, everything else as JSON, so that ``netron`` shows it readably::

    fcn.schema_version = 2
    fcn.name           = atrous_fcn_resnet50_16s
    fcn.labels         = {"names": ["background", ...], "colors": [[0, 0, 0], ...], ...}
    fcn.mean           = [0.485, 0.456, 0.406]
    fcn.shapes         = [[384, 512], [512, 384], [512, 512]]

Version 1 has ``fcn.classes`` instead of ``fcn.labels``: VOC's names. It still loads.

The graph takes ``image`` and returns ``logits``; see `ModelContract.check_graph`. The graph casts
and normalises.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.artefact import voc
from service.artefact.labels import VOC_LABELS, LabelSet
from service.errors import ContractError

SCHEMA_VERSION: Final = 2
METADATA_PREFIX: Final = "fcn."
INPUT_NAME: Final = "image"
OUTPUT_NAME: Final = "logits"
SHAPE_MULTIPLE: Final = 32
"""Height and width of every padded shape are multiples of this many pixels."""

Precision = Literal["fp32", "fp16", "int8"]
Shape = tuple[int, int]
"""``(height, width)`` in pixels."""
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class TensorInfo(Protocol):
    """One input or output of a graph: ONNX Runtime's ``NodeArg``."""

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
    """The properties that vary between models, immutable.

    ``labels`` are the classes of the logits' channels. ``mean`` and ``std`` are RGB in [0, 1]
    units; the graph applies them. ``shapes`` are the ``(height, width)`` pixel shapes that photos
    are padded to, ascending by area. ``metrics`` are fractions such as ``val_miou``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    version: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._+-]+$")
    network: str = Field(min_length=1)
    stride: Literal[1, 2, 4, 8, 16, 32]
    labels: LabelSet = VOC_LABELS
    mean: tuple[UnitInterval, UnitInterval, UnitInterval]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    color_order: Literal["RGB"] = "RGB"
    working_size: int = Field(ge=SHAPE_MULTIPLE, description="pixels of the longest side")
    working_size_rule: Literal["longest_side"] = "longest_side"
    shapes: tuple[Shape, ...] = Field(min_length=1)
    precision: Precision
    metrics: dict[str, float] = {}

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
    def classes(self) -> tuple[str, ...]:
        """Class names by id."""
        return self.labels.names

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
        """Read the contract from ONNX ``metadata_props``; other tools' entries are ignored.

        Raises `ContractError` with one line that names the missing or wrong key.
        """
        found = metadata.get(METADATA_PREFIX + "schema_version")
        if found == "1":
            metadata = _upgraded(metadata)
        elif found is not None and found != str(SCHEMA_VERSION):
            raise ContractError(
                f"{METADATA_PREFIX}schema_version is {found!r}, but this service reads 1 and "
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
        """Compare the contract with the graph's inputs and outputs.

        The graph must have one input ``image`` uint8 ``[N, h, w, 3]`` RGB and one output ``logits``
        float32 ``[N, C, h/stride, w/stride]``, where C is the number of classes and ``N``, ``h``
        and ``w`` are dynamic. Symbolic dimensions do not show the stride: the session's warm-up
        checks it on every listed shape.

        Raises `ContractError` with one line that names the difference.
        """
        _check_tensor("input", inputs, INPUT_NAME, "tensor(uint8)", (None, None, None, 3))
        _check_tensor(
            "output", outputs, OUTPUT_NAME, "tensor(float)", (None, len(self.labels), None, None)
        )


def _upgraded(metadata: Mapping[str, str]) -> dict[str, str]:
    """Convert metadata of schema version 1 to version 2.

    Raises `ContractError` unless the classes are VOC's: version 1 allows no others.
    """
    key = METADATA_PREFIX + "classes"
    upgraded = {**metadata, METADATA_PREFIX + "schema_version": str(SCHEMA_VERSION)}
    try:
        names = json.loads(upgraded.pop(key))
    except KeyError as exc:
        raise ContractError(f"the graph's metadata lacks {key}") from exc
    except json.JSONDecodeError as exc:
        raise ContractError(f"{key} is not JSON: {metadata[key]!r}") from exc
    if not isinstance(names, list) or len(names) != voc.NUM_CLASSES:
        raise ContractError(f"{key} is not a list of VOC's {voc.NUM_CLASSES} names")
    for index, (ours, vocs) in enumerate(zip(names, voc.CLASSES, strict=True)):
        if ours != vocs:
            raise ContractError(f"{key}: class {index} is {ours!r}, but VOC's is {vocs!r}")
    upgraded[METADATA_PREFIX + "labels"] = VOC_LABELS.model_dump_json()
    return upgraded


_TEXT_FIELDS: Final = {"color_order", "working_size_rule", "precision"}


def one_line(error: ValidationError) -> str:
    """The first error of a `ValidationError` as ``field: message``, without pydantic's URL."""
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
        # A dynamic dimension is a symbol or None; a fixed one is an int.
        (not isinstance(got, int)) if size is None else got == size
        for got, size in zip(shape, dimensions, strict=True)
    )
    if not fits:
        raise ContractError(
            f"the graph's {role} {name!r} has shape {shape}, not [{wanted}] (? is dynamic)"
        )
