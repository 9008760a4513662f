"""Reading a request's image: a multipart field or the raw body.

Limits the bytes of one request and the time that a client may take, and takes the bytes of all
bodies from one account of memory. A request takes no place among the photos in flight until its
body is complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import client_address
from service.errors import BodyTooLarge, NoImage, RequestTimeout
from service.http.forms import open_form
from service.memory import Lease
from service.runtime import Service

FIELD: Final = "image"
FIELDS: Final = ("image", "images")
"""The fields for the files of a form with several images; either name, repeated."""
MULTIPART: Final = "multipart/form-data"

PROGRESS_BYTES: Final = 65_536
PROGRESS_PERIODS: Final = 16
"""Within each `Settings.client_timeout_s` a client must send or read `PROGRESS_BYTES`, or this part
of the whole if that is more."""

_MAX_LENGTH_DIGITS: Final = 19

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
        async with open_form(
            capped, max_files=max_images, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
        ) as form:
            uploads = [
                Upload(value.filename or "", value)
                for field, value in form.multi_items()
                if field in FIELDS and isinstance(value, UploadFile)
            ]
            if not uploads:
                raise NoImage(f"the form has no file in a field {FIELD!r}")
            yield uploads


def lease_of(request: Request) -> Lease:
    """What the request holds of the account of memory; `Leases` closes it."""
    lease: Lease = request.state.lease
    return lease


class Leases:
    """ASGI middleware: a request's memory is given back when its answer has been sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Scopes of other types pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service: Service = scope["state"]["service"]
        client = scope.get("client")
        address = client_address(client[0] if client else None)
        with service.segmenter.memory.lease(address) as lease:
            scope["state"]["lease"] = lease
            await self._app(scope, receive, send)


def _media_type(request: Request) -> str:
    """A request's Content-Type in lower case, without parameters."""
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def _announced(request: Request) -> int:
    """The body's length by its Content-Length; 0 if there is none."""
    length = request.headers.get("Content-Length", "")
    # Python does not parse thousands of digits, which may be leading zeros. The body is counted.
    return int(length) if length.isdecimal() and len(length) <= _MAX_LENGTH_DIGITS else 0


async def _read_form(request: Request, max_bytes: int) -> bytes:
    with _capped(request, max_bytes + _MULTIPART_OVERHEAD_BYTES, max_bytes) as capped:
        async with open_form(
            capped, max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
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
    announced = _announced(request)
    if announced > limit_bytes:
        raise _too_large(max_bytes, what)
    service: Service = request.state.service
    service.segmenter.require_place()
    body = _Body(request, service, limit_bytes, announced, _too_large(max_bytes, what))
    yield Request(request.scope, body.receive)


class _Body:
    """A body that is arriving. ``received``: bytes so far."""

    def __init__(
        self,
        request: Request,
        service: Service,
        limit_bytes: int,
        announced: int,
        too_large: BodyTooLarge,
    ) -> None:
        self.received = 0
        self._request = request
        self._lease = lease_of(request)
        self._timeout_s = service.settings.client_timeout_s
        self._limit_bytes = limit_bytes
        self._announced = announced
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
        if self.received > self._limit_bytes:
            raise self._too_large
        self._lease.take_body(size)
        if self.received >= self._progress:
            self._restart_timer()
        return message

    def _restart_timer(self) -> None:
        """Give the client `Settings.client_timeout_s` for the next part of the body."""
        # A chunked body does not announce its size.
        size = max(self.received, self._announced)
        self._progress = self.received + max(PROGRESS_BYTES, size // PROGRESS_PERIODS)
        self._due = self._clock() + self._timeout_s


def _too_large(max_bytes: int, what: str = "an image") -> BodyTooLarge:
    return BodyTooLarge(f"{what} may have at most {max_bytes} bytes")
