"""Reading a request's image: a multipart field or the raw body.

Limits the bytes of one request, the bytes of all requests that arrive at once, and the time that a
client may take. A request takes no place among the photos in flight until its body is complete.
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
"""The fields for the files of a form with several images; either name, repeated."""
MULTIPART: Final = "multipart/form-data"

PROGRESS_BYTES: Final = 65_536
"""Bytes that a client must send or read within each `Settings.client_timeout_s`."""

# Requests of the largest size that may be read at once, into memory or onto the disk.
_LARGEST_AT_ONCE: Final = 8

# Boundaries, part headers and a few small fields around the file of a multipart body.
_MULTIPART_OVERHEAD_BYTES: Final = 16 * 1024
_PART_OVERHEAD_BYTES: Final = 1024
_MAX_FIELDS: Final = 8
_MAX_FIELD_BYTES: Final = 1024


async def read_image(request: Request, max_bytes: int) -> bytes:
    """Read the bytes of a request's image.

    For ``multipart/form-data`` the image is the file in the field ``image``. For any other
    Content-Type it is the body (curl's ``--data-binary`` sends a form's type).

    Raises `NoImage`; `BodyTooLarge` as soon as the bytes, or their announced length, exceed the
    cap; `RequestTimeout` if they arrive too slowly; `Overloaded` if too many bytes of other
    requests are arriving or, before the first byte is read, if there is no place for a photo.
    """
    if _media_type(request) == MULTIPART:
        data = await _read_form(request, max_bytes)
    else:
        data = await read_body(request, max_bytes)
        if not data:
            raise NoImage("the body is empty: send an image, or a form with the file as 'image'")
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


async def read_body(request: Request, max_bytes: int, envelope_bytes: int = 0) -> bytes:
    """Read a whole body that contains an image of at most ``max_bytes`` in an envelope.

    ``envelope_bytes``: size limit of the envelope. Raises as `read_image` does.
    """
    with _capped(request, max_bytes + envelope_bytes, max_bytes) as capped:
        return await capped.body()


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a form. A large one stays on the disk until it is read."""

    name: str
    file: UploadFile

    async def read(self, max_bytes: int) -> bytes:
        """Read its bytes. Raises `NoImage` or `BodyTooLarge`."""
        if not self.file.size:
            raise NoImage("the file is empty")
        if self.file.size > max_bytes:
            raise _too_large(max_bytes)
        return await self.file.read()


@asynccontextmanager
async def open_images(
    request: Request, max_images: int, max_bytes: int
) -> AsyncIterator[list[Upload]]:
    """Open the images in a form's fields `image` or `images`, in order, until the context ends.

    ``max_bytes``: limit for all of them together. Raises as `read_image` does. More than
    ``max_images`` files are a malformed request.
    """
    if _media_type(request) != MULTIPART:
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


def _media_type(request: Request) -> str:
    """A request's Content-Type in lower case, without parameters."""
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


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
    """Wrap a request so that reading its body raises as `read_image` does.

    ``limit_bytes``: limit of the body; ``max_bytes``: limit of ``what``, named in the error.
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
    """A body that is arriving. ``received``: bytes so far."""

    def __init__(
        self, request: Request, service: Service, limit_bytes: int, too_large: BodyTooLarge
    ) -> None:
        self.received = 0
        self._request = request
        self._service = service
        self._limit_bytes = limit_bytes
        self._too_large = too_large
        self._clock = asyncio.get_running_loop().time
        self._restart_timer()

    async def receive(self) -> Message:
        """Receive the next ASGI message."""
        try:
            async with asyncio.timeout_at(self._due):
                message = await self._request.receive()
        except TimeoutError as exc:
            raise RequestTimeout("the body arrived too slowly") from exc
        size = len(message.get("body", b""))
        self.received += size
        self._service.body_bytes += size
        if self.received > self._limit_bytes:
            raise self._too_large
        if self._service.body_bytes > (_LARGEST_AT_ONCE * self._service.settings.max_images_bytes):
            raise Overloaded("too many bytes are arriving at once", 1.0)
        if self.received >= self._progress:
            self._restart_timer()
        return message

    def _restart_timer(self) -> None:
        """Give the client `Settings.client_timeout_s` for the next `PROGRESS_BYTES`."""
        self._progress = self.received + PROGRESS_BYTES
        self._due = self._clock() + self._service.settings.client_timeout_s


def _too_large(max_bytes: int, what: str = "an image") -> BodyTooLarge:
    return BodyTooLarge(f"{what} may have at most {max_bytes} bytes")
