"""Reading a request's image: a multipart field or the raw body.

Never more bytes than the cap, nor more than a process can hold of all that arrive at once, and not
from a client that takes for ever. No place among the photos in flight is taken meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from service.errors import BodyTooLarge, NoImage, Overloaded, RequestTimeout
from service.runtime import Service

FIELD: Final = "image"
FIELDS: Final = ("image", "images")
"""The fields that hold the files of a form of several; either name, repeated."""
MULTIPART: Final = "multipart/form-data"

PROGRESS_BYTES: Final = 65_536
"""What a client has to send, or to read, in each `Settings.client_timeout_s`."""

# Of the largest requests, so many may be read at once: they are in memory, or on the disk.
_LARGEST_AT_ONCE: Final = 8

# Boundaries, part headers and a few small fields around the file of a multipart body.
_MULTIPART_OVERHEAD_BYTES: Final = 16 * 1024
_PART_OVERHEAD_BYTES: Final = 1024
_MAX_FIELDS: Final = 8
_MAX_FIELD_BYTES: Final = 1024


async def read_image(request: Request, max_bytes: int) -> bytes:
    """The bytes of the image that a request carries.

    The body is the image itself, whatever its Content-Type (curl's ``--data-binary`` claims a
    form), unless that is ``multipart/form-data``: then it is the file in the field ``image``.

    Raises `NoImage` or, as soon as the bytes exceed the cap, announced or not, `BodyTooLarge`;
    `RequestTimeout` if they come too slowly, `Overloaded` if too many others come or, before the
    first of them is read, while there is no place for a photo.
    """
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type == MULTIPART:
        data = await _read_form(request, max_bytes)
    else:
        data = await read_body(request, max_bytes)
        if not data:
            raise NoImage("the body is empty: send an image, or a form with the file as 'image'")
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


async def read_body(request: Request, max_bytes: int, envelope_bytes: int = 0) -> bytes:
    """A body that carries an image of at most ``max_bytes`` in an envelope, whole.

    ``envelope_bytes``: what the body may have beyond that. Raises as `read_image` does.
    """
    with _capped(request, max_bytes + envelope_bytes, max_bytes) as capped:
        return await capped.body()


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

    ``max_bytes`` is for all of them together. Raises as `read_image` does; more than ``max_images``
    files are a malformed request.
    """
    content_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if content_type != MULTIPART:
        raise NoImage(f"send {MULTIPART} with the files as {FIELD!r}, once for each")
    overhead = _MULTIPART_OVERHEAD_BYTES + max_images * _PART_OVERHEAD_BYTES
    with _capped(request, max_bytes + overhead, max_bytes, "the images of one request") as capped:
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
    with _capped(request, max_bytes + _MULTIPART_OVERHEAD_BYTES, max_bytes) as capped:
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


@contextmanager
def _capped(
    request: Request, limit_bytes: int, max_bytes: int, what: str = "an image"
) -> Iterator[Request]:
    """The same request, to read its body from, which raises as `read_image` does.

    ``limit_bytes``: most that the body may have; ``max_bytes``: most that it may have of ``what``.
    """
    announced = request.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise _too_large(max_bytes, what)
    service: Service = request.state.service
    service.segmenter.require_place()
    body = _Body(request, service, limit_bytes, _too_large(max_bytes, what))
    try:
        yield Request(request.scope, body.receive)
    finally:
        service.body_bytes -= body.received


class _Body:
    """A body on its way; ``received``: how much of it is there, in bytes."""

    def __init__(
        self, request: Request, service: Service, limit_bytes: int, too_large: BodyTooLarge
    ) -> None:
        self.received = 0
        self._request = request
        self._service = service
        self._limit_bytes = limit_bytes
        self._too_large = too_large
        self._clock = asyncio.get_running_loop().time
        self._go_on()

    async def receive(self) -> Message:
        """The next piece, as ASGI has it."""
        try:
            async with asyncio.timeout_at(self._due):
                message = await self._request.receive()
        except TimeoutError as exc:
            raise RequestTimeout("the body came too slowly") from exc
        size = len(message.get("body", b""))
        self.received += size
        self._service.body_bytes += size
        if self.received > self._limit_bytes:
            raise self._too_large
        if self._service.body_bytes > (_LARGEST_AT_ONCE * self._service.settings.max_images_bytes):
            raise Overloaded("too many bytes are being sent at once", 1.0)
        if self.received >= self._progress:
            self._go_on()
        return message

    def _go_on(self) -> None:
        """Wait anew from here."""
        self._progress = self.received + PROGRESS_BYTES
        self._due = self._clock() + self._service.settings.client_timeout_s


def _too_large(max_bytes: int, what: str = "an image") -> BodyTooLarge:
    return BodyTooLarge(f"{what} may have at most {max_bytes} bytes")
