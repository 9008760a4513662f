"""What the endpoints that speak other services' protocols share."""

from __future__ import annotations

import base64
import binascii
from typing import Final, TypeVar
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import BodyTooLarge, MalformedRequest

MessageT = TypeVar("MessageT", bound="Message")

DATA_URI: Final = "data:"

# A value of a few characters may take a hundred bytes of memory.
_MAX_JSON_VALUES: Final = 2**21

# An explanation is for people; what a caller sent may be megabytes long.
_MAX_COMPLAINT: Final = 300


class Message(BaseModel):
    """Base of request bodies: members that are not known are ignored, types are not converted."""

    model_config = ConfigDict(frozen=True, strict=True)


def parse(message: type[MessageT], text: bytes | memoryview) -> MessageT:
    """A request body in JSON. Raises `MalformedRequest` or `BodyTooLarge`."""
    text = bytes(text)
    if text.count(b",") + text.count(b"[") > _MAX_JSON_VALUES:
        raise BodyTooLarge(f"JSON may have at most {_MAX_JSON_VALUES} values: send binary data")
    try:
        return message.model_validate_json(text)
    except ValidationError as exc:
        raise MalformedRequest(complaint(exc)) from exc


def complaint(error: ValidationError) -> str:
    """The first thing that is wrong, without repeating what was sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return (f"{where}: {message}" if where else message)[:_MAX_COMPLAINT]


def base64_bytes(max_bytes: int) -> int:
    """The length of ``max_bytes`` bytes in base64."""
    return -(-max_bytes // 3) * 4


def decode_base64(text: str, max_bytes: int) -> bytes:
    """An image file in base64. Raises `MalformedRequest` or `BodyTooLarge`."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise MalformedRequest("the image is not in base64") from exc
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
    """Raises `BodyTooLarge` for an image of too many bytes."""
    if size_bytes > max_bytes:
        raise BodyTooLarge(f"an image may have at most {max_bytes} bytes")
