"""Tensors of the Open Inference Protocol over HTTP, in JSON or as binary data after it.

Sources: https://github.com/kserve/open-inference-protocol, ``inference_rest.md``, and Triton's
``extension_binary_data.md``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from service.artefact.contract import ModelContract
from service.errors import ImageTooLarge, InvalidParameter, MalformedRequest
from service.images.decoding import DecodedPhoto, decode
from service.routes.protocols.messages import Message, check_size, decode_base64, parse
from service.schemas import Schema
from service.segmenter import Reading
from service.settings import Settings
from service.views import Scene, check_side

IMAGE: Final = "image"
MASK: Final = "mask"
CONFIDENCE: Final = "confidence"
OUTPUTS: Final = (MASK, CONFIDENCE)

Parameters = dict[str, Any]
Pixels = npt.NDArray[np.uint8]

_BYTES_LENGTH: Final = struct.Struct("<I")
_STRIPE: Final = 1 << 18
# (256, 4): each uint8 as JSON text with a comma, padded with spaces.
_DECIMALS: Final = np.array([list(f"{n},".ljust(4).encode()) for n in range(256)], dtype=np.uint8)


class InputTensor(Message):
    """The photo: `image`, UINT8 `[H, W, 3]` RGB or BYTES `[1]`, an image file."""

    name: str
    shape: list[int] = Field(max_length=8)
    datatype: str
    parameters: Parameters | None = Field(
        None, description="`binary_data_size`: bytes of the tensor after the JSON"
    )
    data: list[Any] | None = Field(
        None, description="UINT8 flat or nested, row by row; BYTES in base64"
    )


class RequestedOutput(Message):
    """An output, `mask` or `confidence`."""

    name: str
    parameters: Parameters | None = Field(
        None, description="`binary_data`: whether the tensor is binary data after the JSON"
    )


class InferenceRequest(Message):
    """One photo to segment."""

    id: str | None = Field(None, max_length=1024)
    parameters: Parameters | None = Field(
        None,
        description="`binary_data_output`: whether all tensors are binary data after the JSON; "
        "`max_side`: longest side of the network's input, pixels",
    )
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = Field(None, description="default: all")


class OutputTensor(Schema):
    """UINT8 of the photo's size, with a leading 1 if the input has it."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = Field(
        None, description="`binary_data_size`, for binary data"
    )
    data: list[int] | None = Field(None, description="flat, row by row; absent for binary data")


class InferenceResponse(Schema):
    """The requested outputs."""

    model_name: str
    model_version: str
    id: str | None = Field(None, description="the request's id")
    outputs: list[OutputTensor]


class Inference:
    """One inference request and its answer, as a `service.segmenter.Job`.

    ``body`` is the request's; its first ``json_bytes`` are JSON and the rest binary data (None: it
    is all JSON).
    """

    def __init__(self, body: bytes, json_bytes: int | None, settings: Settings, model: str) -> None:
        self.model = model
        self._json = body if json_bytes is None else body[:json_bytes]
        self._binary = memoryview(b"" if json_bytes is None else body)[json_bytes or 0 :]
        self._settings = settings
        self._id: str | None = None
        self._outputs: dict[str, bool] = {}
        self._leading: list[int] = []
        self._file_bytes: int | None = None

    def read(self, max_pixels: int, contract: ModelContract) -> Reading:
        """The photo. Raises `RequestError` or `ImageError`."""
        request = parse(InferenceRequest, self._json)
        self._id = request.id
        parameters = request.parameters or {}
        self._outputs = _outputs(request.outputs, _flag(parameters, "binary_data_output") or False)
        max_side = self._max_side(parameters) or contract.working_size
        if [tensor.name for tensor in request.inputs] != [IMAGE]:
            raise MalformedRequest(f"inputs: must be one tensor, {IMAGE!r}")
        photo = self._photo(request.inputs[0], max_pixels, max_side)
        return Reading(
            photo,
            max_side,
            with_confidence=CONFIDENCE in self._outputs,
            file_bytes=self._file_bytes,
        )

    def write(self, scene: Scene) -> tuple[bytes, int | None]:
        """The response body, and the length of its JSON in bytes (None: all of it)."""
        labels, contract = scene.labels, scene.contract
        arrays = {MASK: labels.mask}
        if labels.confidence is not None:
            arrays[CONFIDENCE] = labels.confidence
        members: dict[str, Any] = {
            "model_name": contract.name,
            "model_version": contract.version,
        }
        if self._id is not None:
            members["id"] = self._id
        # The numbers are written between the brackets as text: there may be millions.
        parts = [json.dumps(members)[:-1].encode(), b', "outputs": [']
        tail = []
        for number, (name, binary) in enumerate(self._outputs.items()):
            values = arrays[name]
            shape = [*self._leading, *values.shape]
            tensor: dict[str, Any] = {"name": name, "datatype": "UINT8", "shape": shape}
            if binary:
                tensor["parameters"] = {"binary_data_size": values.size}
                tail.append(values.tobytes())
            parts += [b", "] * (number > 0) + [json.dumps(tensor).encode()]
            if not binary:
                parts[-1] = parts[-1][:-1] + b', "data": ['
                parts += [_decimals(values), b"]}"]
        head = b"".join([*parts, b"]}"])
        return b"".join([head, *tail]), len(head) if tail else None

    def _photo(self, tensor: InputTensor, max_pixels: int, max_side: int) -> DecodedPhoto:
        binary = self._binary_data(tensor)
        if tensor.datatype == "BYTES":
            if tensor.shape not in ([1], [1, 1]):
                raise MalformedRequest(f"{IMAGE}: BYTES must have the shape [1], one image file")
            self._leading = [1] * (len(tensor.shape) - 1)
            data = self._file(tensor, binary)
            self._file_bytes = len(data)
            return decode(data, max_pixels, max_side)
        if tensor.datatype != "UINT8":
            raise MalformedRequest(f"{IMAGE}: datatype must be UINT8 or BYTES")
        *self._leading, height, width, channels = _image_shape(tensor.shape)
        if height * width > max_pixels:
            raise ImageTooLarge(
                f"the image has {width} x {height} pixels, but at most {max_pixels} are allowed"
            )
        values = _uint8(tensor.data or []) if binary is None else np.frombuffer(binary, np.uint8)
        if values.size != height * width * channels:
            raise MalformedRequest(
                f"{IMAGE}: {values.size} values do not fit the shape {tensor.shape}"
            )
        return DecodedPhoto.whole(values.reshape(height, width, channels))

    def _binary_data(self, tensor: InputTensor) -> memoryview | None:
        """The binary data after the JSON; None if the tensor is in the JSON."""
        parameters = tensor.parameters or {}
        if any(name.startswith("shared_memory_") for name in parameters):
            raise MalformedRequest(f"{IMAGE}: shared memory is not supported")
        size = parameters.get("binary_data_size")
        if (size is None) == (tensor.data is None):
            raise MalformedRequest(f"{IMAGE}: must have either data or binary_data_size")
        if len(self._binary) != (0 if size is None else size):
            raise MalformedRequest(
                f"{len(self._binary)} bytes follow the JSON, but binary_data_size is {size!r:.20}"
            )
        # A BYTES tensor begins with its length, which is not part of the file.
        check_size(len(self._binary) - _BYTES_LENGTH.size, self._settings.max_bytes)
        return None if size is None else self._binary

    def _file(self, tensor: InputTensor, binary: memoryview | None) -> bytes:
        """The image file in a BYTES tensor of one element."""
        if binary is None:
            match tensor.data:
                case [str() as text]:
                    return decode_base64(text, self._settings.max_bytes)
            raise MalformedRequest(f"{IMAGE}: BYTES in JSON must be one string in base64")
        length, content = binary[: _BYTES_LENGTH.size], binary[_BYTES_LENGTH.size :]
        if len(length) < _BYTES_LENGTH.size or _BYTES_LENGTH.unpack(length) != (len(content),):
            raise MalformedRequest(
                f"{IMAGE}: BYTES must be a length in four bytes, then that many bytes"
            )
        return bytes(content)

    def _max_side(self, parameters: Parameters) -> int | None:
        max_side = parameters.get("max_side")
        if max_side is not None and type(max_side) is not int:
            raise InvalidParameter("max_side: must be an integer")
        check_side(max_side, self._settings.max_side)
        return max_side


def _outputs(requested: Sequence[RequestedOutput] | None, binary: bool) -> dict[str, bool]:
    """The requested outputs, and whether each is binary data."""
    if not requested:
        return dict.fromkeys(OUTPUTS, binary)
    wanted: dict[str, bool] = {}
    for output in requested:
        if output.name not in OUTPUTS or output.name in wanted:
            raise MalformedRequest(f"outputs: must be {' or '.join(OUTPUTS)}, each at most once")
        parameters = output.parameters or {}
        if not parameters.keys() <= {"binary_data"}:
            raise MalformedRequest(f"outputs: {output.name} has only the parameter binary_data")
        own = _flag(parameters, "binary_data")
        wanted[output.name] = binary if own is None else own
    return wanted


def _flag(parameters: Parameters, name: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise MalformedRequest(f"{name}: must be true or false")
    return value


def _image_shape(shape: list[int]) -> list[int]:
    """The same shape, if it is ``[H, W, 3]`` or ``[1, H, W, 3]``."""
    match shape:
        case [1, height, width, 3] | [height, width, 3] if height > 0 and width > 0:
            return shape
    raise MalformedRequest(
        f"{IMAGE}: UINT8 must have the shape [height, width, 3] or [1, height, width, 3]"
    )


def _uint8(data: list[Any]) -> Pixels:
    """The numbers of JSON, flat or nested, as ``(n,) uint8``."""
    try:
        if data and isinstance(data[0], int):
            return np.frombuffer(bytes(data), dtype=np.uint8)
        values = np.array(data)
    except (ValueError, TypeError, OverflowError) as exc:
        raise MalformedRequest(f"{IMAGE}: data must be integers in 0 to 255") from exc
    in_range = values.dtype.kind in "iu" and ((values >= 0) & (values < 256)).all()
    if not in_range:
        raise MalformedRequest(f"{IMAGE}: data must be integers in 0 to 255")
    return values.reshape(-1).astype(np.uint8)


def _decimals(values: Pixels) -> bytes:
    """The numbers as text, separated by commas."""
    flat = values.reshape(-1)
    parts = []
    for start in range(0, flat.size, _STRIPE):
        text = _DECIMALS[flat[start : start + _STRIPE]]
        parts.append(text[text != ord(" ")].tobytes())
    return b"".join(parts)[:-1]
