"""Reading a request's image: a multipart field or the raw body, never more bytes than the cap."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

from service.errors import BodyTooLarge, NoImage

FIELD: Final = "image"
MULTIPART: Final = "multipart/form-data"

# Boundaries, part headers and a few small fields around the file of a multipart body.
_MULTIPART_OVERHEAD_BYTES: Final = 16 * 1024
_MAX_FIELDS: Final = 8
_MAX_FIELD_BYTES: Final = 1024


async def read_image(request: Request, max_bytes: int) -> bytes:
    """The bytes of the image that a request carries.

    The body is the image itself, whatever its Content-Type (curl's ``--data-binary`` claims a
    form), unless that is ``multipart/form-data``: then it is the file in the field ``image``.

    Raises `NoImage` or, as soon as the bytes exceed the cap, announced or not, `BodyTooLarge`.
    """
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type == MULTIPART:
        data = await _read_form(request, max_bytes)
    else:
        data = await _capped(request, max_bytes, max_bytes).body()
        if not data:
            raise NoImage("the body is empty: send an image, or a form with the file as 'image'")
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


async def _read_form(request: Request, max_bytes: int) -> bytes:
    capped = _capped(request, max_bytes + _MULTIPART_OVERHEAD_BYTES, max_bytes)
    async with capped.form(
        max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
    ) as form:
        field = form.get(FIELD)
        if field is None:
            raise NoImage(f"the form has no field {FIELD!r}")
        if not isinstance(field, UploadFile):
            raise NoImage(f"the field {FIELD!r} is text, not a file")
        data = await field.read()
        if not data:
            raise NoImage(f"the file in the field {FIELD!r} is empty")
        return data


def _capped(request: Request, limit_bytes: int, max_bytes: int) -> Request:
    """The same request, whose body raises `BodyTooLarge` past ``limit_bytes``."""
    announced = request.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise _too_large(max_bytes)
    return Request(request.scope, _counting(request.receive, limit_bytes, max_bytes))


def _counting(receive: Receive, limit_bytes: int, max_bytes: int) -> Receive:
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit_bytes:
            raise _too_large(max_bytes)
        return message

    return counted


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"an image may have at most {max_bytes} bytes")
