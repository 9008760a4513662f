"""Request bodies, images in base64 and answers, for all endpoints with foreign protocols."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final, TypeVar
from urllib.parse import unquote_to_bytes

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import BodyTooLarge, MalformedRequest
from service.http.uploads import read_body
from service.settings import Settings

MessageT = TypeVar("MessageT", bound="Message")

DATA_URI: Final = "data:"

BINARY: Final = {"schema": {"type": "string", "format": "binary"}}
"""OpenAPI's media type object for bytes."""

# A JSON value of a few characters may take a hundred bytes of memory.
_MAX_JSON_VALUES: Final = 2**21

# Characters of an explanation: the names in a request may be megabytes long.
_MAX_COMPLAINT: Final = 300


class Message(BaseModel):
    """Base class of request bodies. Unknown members are ignored; types are not converted."""

    model_config = ConfigDict(frozen=True, strict=True)


def request_body(
    message: type[Message], *, binary: bool = False, required: bool = True, description: str = ""
) -> dict[str, Any]:
    """``openapi_extra`` of an endpoint that parses its own body.

    ``binary``: the body may also be ``application/octet-stream``.
    """
    schema = {"$ref": f"#/components/schemas/{message.__name__}"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if binary:
        content["application/octet-stream"] = BINARY
    body: dict[str, Any] = {"required": required, "content": content}
    if description:
        body["description"] = description
    return {"requestBody": body}


async def read_image_body(request: Request, settings: Settings, envelope_bytes: int) -> bytes:
    """A body that may carry an image in base64, in at most ``envelope_bytes`` of JSON.

    Raises as `read_body` does.
    """
    max_bytes = settings.max_bytes
    base64_bytes = -(-max_bytes // 3) * 4
    return await read_body(request, max_bytes, base64_bytes - max_bytes + envelope_bytes)


def parse(message: type[MessageT], text: bytes | memoryview) -> MessageT:
    """The message in a JSON body. Raises `MalformedRequest` or `BodyTooLarge`."""
    text = bytes(text)
    if text.count(b",") + text.count(b"[") > _MAX_JSON_VALUES:
        raise BodyTooLarge(f"JSON may have at most {_MAX_JSON_VALUES} values: send binary data")
    try:
        return message.model_validate_json(text)
    except ValidationError as exc:
        raise MalformedRequest(complaint(exc)) from exc


def complaint(error: ValidationError) -> str:
    """The first error, without the value that the client sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return (f"{where}: {message}" if where else message)[:_MAX_COMPLAINT]


def decode_base64(text: str, max_bytes: int) -> bytes:
    """An image file in base64. Raises `MalformedRequest` or `BodyTooLarge`."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise MalformedRequest("the image is not valid base64") from exc
    check_size(len(data), max_bytes)
    return data


def decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """An image file in a ``data:`` URI (RFC 2397). Raises as `decode_base64` does."""
    header, comma, content = uri.partition(",")
    if not comma:
        raise MalformedRequest("the data: URI has no comma")
    if header.endswith(";base64"):
        return decode_base64(content, max_bytes)
    data = unquote_to_bytes(content)
    check_size(len(data), max_bytes)
    return data


def check_size(size_bytes: int, max_bytes: int) -> None:
    """Raises `BodyTooLarge` for an image of more than ``max_bytes``."""
    if size_bytes > max_bytes:
        raise BodyTooLarge(f"an image may have at most {max_bytes} bytes")
