"""The job of ``POST /v2/models/{name}/infer``: tensors of the Open Inference Protocol over HTTP.

They are in JSON or binary data after it. Sources:
https://github.com/kserve/open-inference-protocol, ``inference_rest.md``, and Triton's
``extension_binary_data.md``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from service.artefact.contract import ModelContract
from service.errors import ImageTooLarge, InvalidParameter, MalformedRequest
from service.images.decoding import DecodedPhoto
from service.jobs.base import Grant, NeedsMemory, Reading, Written
from service.jobs.messages import (
    MAX_ANSWER_BYTES,
    NUMBER_BYTES,
    Message,
    check_names,
    check_size,
    decode_base64,
    json_memory,
    parse,
    write_numbers,
)
from service.schemas import Schema
from service.views import Scene, check_side
from service.workers.replies import whole

IMAGE: Final = "image"
MASK: Final = "mask"
CONFIDENCE: Final = "confidence"
OUTPUTS: Final = (MASK, CONFIDENCE)

Parameters = dict[str, Any]
Size = Annotated[int, Field(le=2**31)]
Pixels = npt.NDArray[np.uint8]

# Memory for each pixel, bytes: of the photo and its copy for the resize; of an output as binary
# data, which is computed, written, sent and received; of one in JSON, which is text from then on.
_PHOTO_BYTES: Final = 6
_BINARY_BYTES: Final = 4
_JSON_BYTES: Final = 1 + 3 * NUMBER_BYTES

# Of a request, and of its tensor. After the first ones, what clients send for the schedulers and
# codecs of other servers; the answer does not depend on it.
_PARAMETERS: Final = (
    "binary_data_output",
    "max_side",
    *("priority", "timeout", "sequence_id", "sequence_start", "sequence_end"),
    *("content_type", "headers"),
)
_TENSOR_PARAMETERS: Final = ("binary_data_size", "content_type")

_BYTES_LENGTH: Final = struct.Struct("<I")
# [1, H, W, 3]
_MAX_RANK: Final = 4


class InputTensor(Message):
    """The photo: `image`, UINT8 `[H, W, 3]` RGB or BYTES `[1]`, an image file."""

    name: str
    shape: list[Size] = Field(max_length=8, fail_fast=True)
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
    inputs: list[InputTensor] = Field(max_length=1, fail_fast=True)
    outputs: list[RequestedOutput] | None = Field(
        None, max_length=len(OUTPUTS), fail_fast=True, description="default: all"
    )


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


@dataclass(frozen=True, slots=True)
class InferenceJob:
    """One inference request.

    ``json_bytes``: length of the JSON at the body's start; the rest is binary data (None: it is all
    JSON). ``max_bytes``: largest image file; ``max_side``: largest ``max_side`` of a request.
    """

    model: str
    json_bytes: int | None
    max_bytes: int
    max_side: int

    def read(self, body: bytes, grant: Grant, contract: ModelContract) -> Reading:
        """See `service.jobs.base.Job`."""
        text = body[: self.json_bytes]
        if not text:
            raise MalformedRequest(
                f"there is no JSON: send an object with inputs, one tensor {IMAGE!r}"
            )
        grant.require(json_memory(text), pixels=0)
        request = parse(InferenceRequest, text)
        if [tensor.name for tensor in request.inputs] != [IMAGE]:
            raise MalformedRequest(f"inputs: must be one tensor, named {IMAGE!r}")
        (tensor,) = request.inputs
        parameters = request.parameters or {}
        check_names(parameters, _PARAMETERS)
        outputs = _outputs(request.outputs, _flag(parameters, "binary_data_output") or False)
        max_side = _side(parameters, self.max_side) or contract.working_size
        binary = _binary_data(tensor, memoryview(body)[len(text) :], self.max_bytes)
        leading = _leading(tensor)
        writer = _ResponseWriter(request.id, outputs, leading)
        output_bytes = sum(_BINARY_BYTES if binary else _JSON_BYTES for binary in outputs.values())
        file_bytes = None
        if tensor.datatype == "BYTES":
            file = _file(tensor, binary, self.max_bytes)
            del request, tensor  # the photo may take the memory that the JSON took
            try:
                photo = grant.decode(file, max_side, output_bytes)
            except NeedsMemory as needs:
                # The advice is of more use than that there is too little memory.
                _check_answer(needs.pixels, outputs)
                raise
            file_bytes = len(file)
        else:
            photo = _photo(tensor, binary, grant.max_pixels)
        pixels = math.prod(photo.size)
        _check_answer(pixels, outputs)
        grant.require(pixels * max(_PHOTO_BYTES, output_bytes), pixels)
        return Reading(photo, max_side, CONFIDENCE in outputs, writer, file_bytes)

    def check(self, facts: Mapping[str, Any], size: int) -> None:
        """See `service.jobs.base.Job`."""
        if facts["json_bytes"] is not None:
            whole(facts["json_bytes"], 0, size)


@dataclass(frozen=True, slots=True)
class _ResponseWriter:
    """Writes the response; its fact ``json_bytes`` is the length of its JSON, None: all of it.

    ``outputs``: the names, and whether each is binary data; ``leading``: number of 1s before the
    photo's size in their shapes.
    """

    request_id: str | None
    outputs: Mapping[str, bool]
    leading: int

    @property
    def needs_photo(self) -> bool:
        """See `service.jobs.base.Writer`."""
        return False

    def write(self, scene: Scene) -> Written:
        """See `service.jobs.base.Writer`."""
        contract = scene.contract
        members = {"model_name": contract.name, "model_version": contract.version}
        if self.request_id is not None:
            members["id"] = self.request_id
        # The numbers are written between the brackets as text: there may be millions.
        content = bytearray(json.dumps(members)[:-1].encode() + b', "outputs": [')
        tail = []
        for number, (name, binary) in enumerate(self.outputs.items()):
            values = scene.labels.mask if name == MASK else scene.require_confidence()
            shape = [1] * self.leading + list(values.shape)
            tensor: dict[str, Any] = {"name": name, "datatype": "UINT8", "shape": shape}
            if binary:
                tensor["parameters"] = {"binary_data_size": values.size}
                tail.append(values)
            content += b", " * (number > 0) + json.dumps(tensor)[:-1].encode()
            if not binary:
                content += b', "data": ['
                write_numbers(content, values)
                content += b"]"
            content += b"}"
        content += b"]}"
        json_bytes = len(content) if tail else None
        for values in tail:
            content += np.ascontiguousarray(values).data.cast("B")
        return Written(content, {"json_bytes": json_bytes})


def _check_answer(pixels: int, outputs: Mapping[str, bool]) -> None:
    """Raise `ImageTooLarge` if the answer's JSON would have too many numbers."""
    numbers = pixels * sum(not binary for binary in outputs.values())
    if numbers * NUMBER_BYTES > MAX_ANSWER_BYTES:
        raise ImageTooLarge(
            f"an answer in JSON may have at most {MAX_ANSWER_BYTES // NUMBER_BYTES} numbers, but "
            f"this one would have {numbers}: ask for binary data with binary_data_output"
        )


def _leading(tensor: InputTensor) -> int:
    """The number of 1s before the shape that the input must have. Raises `MalformedRequest`."""
    match tensor.datatype, tensor.shape:
        case "BYTES", [1] | [1, 1]:
            return len(tensor.shape) - 1
        case "BYTES", _:
            raise MalformedRequest(f"{IMAGE}: BYTES must have the shape [1], one image file")
        case "UINT8", [1, height, width, 3] | [height, width, 3] if height > 0 and width > 0:
            return len(tensor.shape) - 3
        case "UINT8", _:
            raise MalformedRequest(
                f"{IMAGE}: UINT8 must have the shape [height, width, 3] or [1, height, width, 3], "
                "with at least one pixel"
            )
    raise MalformedRequest(f"{IMAGE}: datatype must be UINT8 or BYTES")


def _photo(tensor: InputTensor, binary: memoryview | None, max_pixels: int) -> DecodedPhoto:
    """The photo in a UINT8 tensor. Raises `ImageTooLarge` or `MalformedRequest`."""
    height, width, channels = tensor.shape[-3:]
    if height * width > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} pixels, but at most {max_pixels} are allowed"
        )
    values = _uint8(tensor.data or []) if binary is None else np.frombuffer(binary, np.uint8)
    if values.size != height * width * channels:
        raise MalformedRequest(
            f"{IMAGE}: the shape {tensor.shape} needs {height * width * channels} values, but "
            f"there are {values.size}"
        )
    return DecodedPhoto.whole(values.reshape(height, width, channels))


def _binary_data(tensor: InputTensor, binary: memoryview, max_bytes: int) -> memoryview | None:
    """The binary data after the JSON; None if the tensor is in the JSON.

    Raises `MalformedRequest` or `BodyTooLarge`.
    """
    parameters = tensor.parameters or {}
    if any(name.startswith("shared_memory_") for name in parameters):
        raise MalformedRequest(
            f"{IMAGE}: shared memory is not supported: send data, or binary data after the JSON"
        )
    check_names(parameters, _TENSOR_PARAMETERS)
    size = parameters.get("binary_data_size")
    if (size is None) == (tensor.data is None):
        raise MalformedRequest(
            f"{IMAGE}: must have either data, or the parameter binary_data_size and as many bytes "
            "after the JSON"
        )
    if size is not None and type(size) is not int:
        raise MalformedRequest(f"{IMAGE}: binary_data_size must be an integer")
    if len(binary) != (size or 0):
        said = "data is in the JSON" if size is None else f"binary_data_size is {size!r:.20}"
        raise MalformedRequest(
            f"{IMAGE}: {said}, but {len(binary)} bytes follow the JSON, whose own length must be "
            "in the header Inference-Header-Content-Length"
        )
    # A BYTES tensor begins with its length, which is not part of the file.
    check_size(len(binary) - _BYTES_LENGTH.size, max_bytes)
    return None if size is None else binary


def _file(tensor: InputTensor, binary: memoryview | None, max_bytes: int) -> bytes:
    """The image file in a BYTES tensor of one element.

    Raises `MalformedRequest` or `BodyTooLarge`.
    """
    if binary is None:
        match tensor.data:
            case [str() as text]:
                try:
                    return decode_base64(text.encode(), max_bytes)
                except MalformedRequest as exc:
                    raise MalformedRequest(f"{IMAGE}: data must be valid base64") from exc
        raise MalformedRequest(f"{IMAGE}: data of BYTES must be one image file in base64")
    length, content = binary[: _BYTES_LENGTH.size], binary[_BYTES_LENGTH.size :]
    if len(length) < _BYTES_LENGTH.size or _BYTES_LENGTH.unpack(length) != (len(content),):
        raise MalformedRequest(
            f"{IMAGE}: binary data of BYTES must be a length in four bytes, little-endian, then "
            "that many bytes"
        )
    return bytes(content)


def _side(parameters: Parameters, limit: int) -> int | None:
    """The parameter ``max_side``. Raises `InvalidParameter`."""
    max_side = parameters.get("max_side")
    if max_side is not None and type(max_side) is not int:
        raise InvalidParameter("max_side: must be an integer")
    check_side(max_side, limit)
    return max_side


def _outputs(requested: Sequence[RequestedOutput] | None, binary: bool) -> dict[str, bool]:
    """The requested outputs, and whether each is binary data. Raises `MalformedRequest`."""
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


def _uint8(data: list[Any]) -> Pixels:
    """The numbers of JSON, flat or nested, as ``(n,) uint8``. Raises `MalformedRequest`.

    NumPy sees no value before its type is known: it would turn a long string and a million short
    ones into a million long ones.
    """
    for _ in range(_MAX_RANK - 1):
        if set(map(type, data)) != {list}:
            break
        if len(set(map(len, data))) != 1:
            raise MalformedRequest(f"{IMAGE}: data must be flat, or lists of the same length")
        data = list(chain.from_iterable(data))
    try:
        if set(map(type, data)) <= {int}:
            return np.frombuffer(bytes(data), dtype=np.uint8)
    except ValueError:  # out of range
        pass
    raise MalformedRequest(f"{IMAGE}: data must be integers in 0 to 255")
