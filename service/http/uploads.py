"""Reading a request's image: a multipart field or the raw body.

Limits the bytes of one request and the time that a client may take, and takes the bytes of all
bodies from one account of memory. A request takes no place among the photos in flight until its
body is complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import client_address
from service.errors import BodyTooLarge, InvalidParameter, NoImage, RequestTimeout
from service.http.forms import read_form
from service.memory import Lease
from service.runtime import Service

FIELD: Final = "image"
_FIELDS: Final = frozenset({FIELD, "images", "file", "files"})
"""Names of the field with the image; ``[]`` may follow."""
MULTIPART: Final = "multipart/form-data"

PROGRESS_BYTES: Final = 65_536
PROGRESS_PERIODS: Final = 16
"""Within each `Settings.client_timeout_s` a client must send or read `PROGRESS_BYTES`, or this part
of the whole if that is more."""

_MAX_LENGTH_DIGITS: Final = 19

# Boundaries, part headers and a few small fields around the file of a multipart body.
_MULTIPART_OVERHEAD_BYTES: Final = 32 * 1024
_PART_OVERHEAD_BYTES: Final = 1024

Fields = Sequence[tuple[str, str]]
"""The names and values of a form's text fields."""


async def read_image(request: Request, max_bytes: int) -> tuple[bytes, Fields]:
    """Read the bytes of a request's image, and the other fields of its form.

    For ``multipart/form-data`` the image is the file in the field ``image``. For any other
    Content-Type it is the body (curl's ``--data-binary`` sends a form's type).

    Raises `NoImage`; `BodyTooLarge` as soon as the bytes, or their announced length, exceed the
    cap; `RequestTimeout` if they arrive too slowly; `Overloaded` if too many bytes of other
    requests are arriving or, before the first byte is read, if there is no place for a photo.
    """
    if _media_type(request) == MULTIPART:
        with _capped(request, max_bytes + _MULTIPART_OVERHEAD_BYTES, max_bytes) as capped:
            (upload,), fields = await _read_uploads(capped, 1)
        return upload.read(max_bytes), fields
    data = await read_body(request, max_bytes)
    if not data:
        raise NoImage("the body is empty: send an image, or a form with the file as 'image'")
    return data, ()


async def read_body(request: Request, max_bytes: int, envelope_bytes: int = 0) -> bytes:
    """Read a whole body that contains an image of at most ``max_bytes`` in an envelope.

    ``envelope_bytes``: size limit of the envelope. Raises as `read_image` does.
    """
    with _capped(request, max_bytes + envelope_bytes, max_bytes) as capped:
        return await capped.body()


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a form."""

    name: str
    content: memoryview

    def read(self, max_bytes: int) -> bytes:
        """Copy its bytes. Raises `NoImage` or `BodyTooLarge`."""
        if not self.content:
            raise NoImage("the file is empty")
        if len(self.content) > max_bytes:
            raise _too_large(max_bytes)
        return bytes(self.content)


async def read_images(
    request: Request, max_images: int, max_bytes: int
) -> tuple[list[Upload], Fields]:
    """Read the images in a form's fields ``image``, in order, and the other fields.

    ``max_bytes``: limit for all of them together. Raises as `read_image` does. More than
    ``max_images`` files are a malformed request.
    """
    if _media_type(request) != MULTIPART:
        raise NoImage(f"send {MULTIPART} with the files as {FIELD!r}, once for each")
    overhead = _MULTIPART_OVERHEAD_BYTES + max_images * _PART_OVERHEAD_BYTES
    with _capped(request, max_bytes + overhead, max_bytes, "the images of one request") as capped:
        return await _read_uploads(capped, max_images)


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


async def _read_uploads(capped: Request, max_files: int) -> tuple[list[Upload], Fields]:
    """Read a form's images and other fields.

    Raises `NoImage`, `MalformedRequest`, `InvalidParameter`, and what receiving raises.
    """
    body = bytearray()  # a list of pieces and what is joined of it would take twice the memory
    async for piece in capped.stream():
        body += piece
    form = read_form(capped.headers.get("Content-Type", ""), body, max_files)
    uploads = [Upload(one.name, one.content) for one in form.files if _is_image(one.field)]
    if not uploads:
        if any(_is_image(name) for name, _ in form.fields):
            raise NoImage(f"the field {FIELD!r} is text, not a file: send it with a filename")
        raise NoImage(f"the form has no file in a field {FIELD!r}")
    for file in form.files:
        if not _is_image(file.field):
            raise InvalidParameter(f"{file.field:.80}: send the file in the field {FIELD!r}")
    return uploads, form.fields


def _is_image(field: str) -> bool:
    return field.removesuffix("[]") in _FIELDS


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
