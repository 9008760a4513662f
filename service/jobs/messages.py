"""JSON of other services' protocols, and images in base64, read in image workers.

A few characters of JSON can take hundreds of bytes of memory and thousands of them one error
object. So its memory is estimated before it is parsed, and lists stop at their first error.
"""

from __future__ import annotations

import binascii
import difflib
from collections.abc import Collection, Iterable
from typing import Final, TypeVar
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import BodyTooLarge, InvalidParameter, MalformedRequest, TooExpensive

MessageT = TypeVar("MessageT", bound="Message")

DATA_URI: Final = b"data:"

MAX_JSON_MEMORY: Final = 384 * 2**20
"""Most memory that a request's JSON may take: enough for 2,500,000 numbers."""

MAX_ANSWER_BYTES: Final = 128 * 2**20
"""Longest answer as text. The worker, the channel and the service each hold one copy of it."""

# Upper limits of what pydantic's parser was measured to take, bytes: per character, per value in a
# list, per list and per object, with the Python objects that it returns.
_CHARACTER: Final = 6
_VALUE: Final = 130
_LIST: Final = 170
_OBJECT: Final = 450

# Characters of an explanation: the names in a request may be megabytes long.
_MAX_COMPLAINT: Final = 300
_SHOWN: Final = 80
# Each takes a Python object; image files are sent in base64.
_MAX_ESCAPES: Final = 2**16

_STRIPE: Final = 1 << 18
# (256, 4): each uint8 as text with a comma, padded with spaces.
_NUMBERS: Final = np.array([list(f"{n},".ljust(4).encode()) for n in range(256)], dtype=np.uint8)
NUMBER_BYTES: Final = 4
"""Most bytes of one number in `write_numbers`."""


class Message(BaseModel):
    """Base of requests. Unknown members are ignored; types are not converted.

    Every list of objects or numbers has ``fail_fast``, so that a request has at most one error for
    each field, and mappings that are validated again have a greatest length.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


def json_memory(text: bytes) -> int:
    """The bytes of memory that parsing ``text`` may take. Raises `BodyTooLarge`."""
    memory_bytes = (
        _CHARACTER * len(text)
        + _VALUE * text.count(b",")
        + _LIST * text.count(b"[")
        + _OBJECT * text.count(b"{")
    )
    if memory_bytes > MAX_JSON_MEMORY:
        raise BodyTooLarge("the JSON has too many values: send fewer, or binary data")
    return memory_bytes


def parse(message: type[MessageT], text: bytes) -> MessageT:
    """The message in JSON of bounded `json_memory`. Raises `MalformedRequest`."""
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


def check_names(given: Iterable[str], known: Collection[str]) -> None:
    """Raises `InvalidParameter` for the first name that is not known."""
    for name in given:
        if name not in known:
            raise InvalidParameter(f"{name[:_SHOWN]}: {unknown_name(name, known)}")


def unknown_name(name: str, known: Collection[str]) -> str:
    """What an error says about a parameter that is not known: the nearest name, or all names."""
    close = difflib.get_close_matches(name[:_SHOWN].lower(), known, n=1)
    if close:
        return f"is not known; did you mean {close[0]}?"
    return f"is not known; known are: {', '.join(known) or 'none'}"


def decode_image_text(text: bytes, max_bytes: int) -> bytes:
    """An image file as a ``data:`` URI or in base64.

    Raises `MalformedRequest`, or `BodyTooLarge` for more than ``max_bytes``.
    """
    return (decode_data_uri if text.startswith(DATA_URI) else decode_base64)(text, max_bytes)


def decode_base64(text: bytes | memoryview, max_bytes: int) -> bytes:
    """An image file in base64. Raises as `decode_image_text` does."""
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as exc:
        raise MalformedRequest("the image is not valid base64") from exc
    check_size(len(data), max_bytes)
    return data


def decode_data_uri(uri: bytes, max_bytes: int) -> bytes:
    """An image file in a ``data:`` URI (RFC 2397). Raises as `decode_image_text` does."""
    comma = uri.find(b",")
    if comma < 0:
        raise MalformedRequest("the data: URI has no comma")
    if uri.endswith(b";base64", 0, comma):
        return decode_base64(memoryview(uri)[comma + 1 :], max_bytes)
    if uri.count(b"%", comma) > _MAX_ESCAPES:
        raise BodyTooLarge("the data: URI has too many escapes: send it in base64")
    data = unquote_to_bytes(uri[comma + 1 :])
    check_size(len(data), max_bytes)
    return data


def check_size(size_bytes: int, max_bytes: int) -> None:
    """Raises `BodyTooLarge` for an image of more than ``max_bytes``."""
    if size_bytes > max_bytes:
        raise BodyTooLarge(f"an image may have at most {max_bytes} bytes")


def check_answer(size_bytes: int) -> None:
    """Raises `TooExpensive` for an answer of more than `MAX_ANSWER_BYTES`."""
    if size_bytes > MAX_ANSWER_BYTES:
        raise TooExpensive(f"the answer would have more than {MAX_ANSWER_BYTES >> 20} MiB")


def write_numbers(text: bytearray, values: npt.NDArray[np.uint8]) -> None:
    """Append the numbers, at least one, separated by commas."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, _STRIPE):
        stripe = _NUMBERS[flat[start : start + _STRIPE]]
        text += memoryview(stripe[stripe != ord(" ")])
    del text[-1:]
