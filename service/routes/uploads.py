"""Reading a request's image: a multipart field or the raw body, never more bytes than the cap."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

from service.errors import BodyTooLarge, NoImage

FIELD: Final = "image"
FIELDS: Final = ("image", "images")
"""The fields that hold the files of a form of several; either name, repeated."""
MULTIPART: Final = "multipart/form-data"

# Boundaries, part headers and a few small fields around the file of a multipart body.
_MULTIPART_OVERHEAD_BYTES: Final = 16 * 1024
_PART_OVERHEAD_BYTES: Final = 1024
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


async def read_body(request: Request, max_bytes: int, envelope_bytes: int = 0) -> bytes:
    """A body that carries an image of at most ``max_bytes`` in an envelope, whole.

    ``envelope_bytes``: what the body may have beyond that. Raises `BodyTooLarge` as soon as it has
    more, announced or not.
    """
    return await _capped(request, max_bytes + envelope_bytes, max_bytes).body()


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a form; large ones lie on the disk until they are read."""

    name: str
    file: UploadFile

    async def read(self, max_bytes: int) -> bytes:
        """Its bytes. Raises `NoImage` or `BodyTooLarge`."""
        if not self.file.size:
            raise NoImage("the file is empty")
        if self.file.size > max_bytes:
            raise _too_large(max_bytes)
        return await self.file.read()


@asynccontextmanager
async def open_images(
    request: Request, max_images: int, max_bytes: int
) -> AsyncIterator[list[Upload]]:
    """The images in a form's fields `image` or `images`, in their order; open until the end.

    ``max_bytes`` is for all of them together. Raises `NoImage` or, as soon as the bytes exceed the
    cap, announced or not, `BodyTooLarge`; more than ``max_images`` files are a malformed request.
    """
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type != MULTIPART:
        raise NoImage(f"send {MULTIPART} with the files as {FIELD!r}, once for each")
    overhead = _MULTIPART_OVERHEAD_BYTES + max_images * _PART_OVERHEAD_BYTES
    capped = _capped(request, max_bytes + overhead, max_bytes, "the images of one request")
    async with capped.form(
        max_files=max_images, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
    ) as form:
        uploads = [
            Upload(value.filename or "", value)
            for field, value in form.multi_items()
            if field in FIELDS and isinstance(value, UploadFile)
        ]
        if not uploads:
            raise NoImage(f"the form has no file in a field {FIELD!r}")
        yield uploads


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


def _capped(request: Request, limit_bytes: int, max_bytes: int, what: str = "an image") -> Request:
    """The same request, whose body raises `BodyTooLarge` past ``limit_bytes``."""
    announced = request.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise _too_large(max_bytes, what)
    return Request(request.scope, _counting(request.receive, limit_bytes, max_bytes, what))


def _counting(receive: Receive, limit_bytes: int, max_bytes: int, what: str) -> Receive:
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit_bytes:
            raise _too_large(max_bytes, what)
        return message

    return counted


def _too_large(max_bytes: int, what: str = "an image") -> BodyTooLarge:
    return BodyTooLarge(f"{what} may have at most {max_bytes} bytes")
