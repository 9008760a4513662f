"""Opens a request's multipart form, with checks that Starlette's parser lacks.

The parser decodes names with the codec that the request's ``charset`` parameter names; some of
Python's codecs are no character sets and raise errors of their own. It also reads some bytes one by
one in Python: the padding after a delimiter, and each delimiter that is followed by something else.
Source: RFC 7578; RFC 2046, section 5.1.1.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.types import Message

from service.errors import MalformedRequest

_MAX_TYPE_BYTES: Final = 1024
# RFC 2046 allows 70 characters; the parser accepts 256.
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,255}[0-9A-Za-z'()+_,./:=?-]")


@asynccontextmanager
async def open_form(
    request: Request, *, max_files: int, max_fields: int, max_part_size: int
) -> AsyncIterator[FormData]:
    """Read a form; its files are closed when the context ends.

    Names and values are UTF-8, or Latin-1 where they are not valid UTF-8. The media type has no
    ``charset``, so that parameter is ignored. Raises `MalformedRequest` or an `HTTPException` with
    400 for what is no form, and what receiving raises.
    """
    boundary = _boundary(request.headers.get("Content-Type", ""))
    delimiters = _Delimiters(boundary, max_files + max_fields + 1)

    async def receive() -> Message:
        message = await request.receive()
        delimiters.check(message.get("body", b""))
        return message

    headers = [one for one in request.scope["headers"] if one[0] != b"content-type"]
    headers.append((b"content-type", b'multipart/form-data; boundary="%s"' % boundary))
    checked = Request({**request.scope, "headers": headers}, receive)
    async with checked.form(
        max_files=max_files, max_fields=max_fields, max_part_size=max_part_size
    ) as form:
        yield form


def _boundary(content_type: str) -> bytes:
    """The boundary in a Content-Type. Raises `MalformedRequest`."""
    if len(content_type) > _MAX_TYPE_BYTES:
        raise MalformedRequest(f"a form's Content-Type may have at most {_MAX_TYPE_BYTES} bytes")
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise MalformedRequest("a form's Content-Type needs a valid boundary")
    return boundary


class _Delimiters:
    """Counts the delimiters of a form's parts as it arrives, and checks what follows them."""

    def __init__(self, boundary: bytes, most: int) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._left = most
        # The first delimiter may be at the very beginning.
        self._rest = b"\r\n"

    def check(self, data: bytes) -> None:
        """Check the next bytes. Raises `MalformedRequest`."""
        data = self._rest + data
        found = data.find(self._delimiter)
        while found >= 0:
            end = found + len(self._delimiter)
            after = data[end : end + 2]
            if len(after) < 2:
                break
            self._left -= 1
            if self._left < 0:
                raise MalformedRequest("the form has too many parts")
            if after not in (b"\r\n", b"--"):
                raise MalformedRequest("the form's boundary occurs in a part")
            found = data.find(self._delimiter, end)
        # The start of a delimiter that the next bytes may complete.
        self._rest = data[found if found >= 0 else max(0, len(data) - len(self._delimiter) + 1) :]
