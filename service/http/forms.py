"""Reads a multipart form out of a request's body.

The body is complete and of a limited size, so the form is cut at its delimiters: nothing is copied,
and no file is written. Source: RFC 7578; RFC 2046, section 5.1.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from python_multipart.multipart import parse_options_header

from service.errors import MalformedRequest

MAX_FIELDS: Final = 16
"""Most text fields of a form."""
MAX_FIELD_BYTES: Final = 16 * 1024
"""Longest text of a field: enough for the names of 255 classes."""

_MAX_TYPE_BYTES: Final = 1024
_MAX_HEAD_BYTES: Final = 8 * 1024
_MAX_PADDING_BYTES: Final = 1024
# RFC 2046 allows 70 characters; some clients use more.
_BOUNDARY: Final = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,255}[0-9A-Za-z'()+_,./:=?-]")
# RFC 8187. RFC 7578 forbids it in forms, but clients send it with names that are not ASCII.
_EXTENDED_NAME: Final = re.compile(r";\s*filename\*\s*=\s*utf-8'[^']*'([^;\s]*)", re.IGNORECASE)
_ANY_EXTENDED_NAME: Final = re.compile(r";\s*filename\*\s*=", re.IGNORECASE)
_FOLD: Final = re.compile(rb"\r\n[ \t]+")


class File(NamedTuple):
    """A file of a form. ``content``: a view of the body."""

    field: str
    name: str
    content: memoryview


class Form(NamedTuple):
    """The files and the text fields of a form, each in its order."""

    files: list[File]
    fields: list[tuple[str, str]]


def read_form(content_type: str, body: bytes | bytearray, max_files: int) -> Form:
    """Read a form of at most ``max_files`` files and `MAX_FIELDS` fields.

    A part is a file if it has a file name, or a Content-Type other than text. Names and values are
    UTF-8, or Latin-1 where they are not valid UTF-8; no parameter chooses another codec. Raises
    `MalformedRequest`.
    """
    form = Form([], [])
    for part in _parts(body, _boundary(content_type)):
        headers, start = _headers(body, part)
        disposition, parameters = parse_options_header(headers.get("content-disposition", ""))
        name = parameters.get(b"name")
        if disposition != b"form-data" or name is None:
            raise MalformedRequest("a part of the form has no name: send form-data; name=...")
        content = _decoded(memoryview(body)[start : part.stop], headers)
        filename = _filename(headers, parameters)
        if filename is not None:
            if len(form.files) == max_files:
                raise MalformedRequest(f"the form has more than {max_files} files")
            form.files.append(File(_text(name), filename, content))
        elif len(content) > MAX_FIELD_BYTES:
            raise MalformedRequest(
                f"the field {_text(name)[:80]!r} has no filename, so it is text: text may have at "
                f"most {MAX_FIELD_BYTES} bytes"
            )
        elif len(form.fields) == MAX_FIELDS:
            raise MalformedRequest(f"the form has more than {MAX_FIELDS} fields")
        else:
            form.fields.append((_text(name), _text(bytes(content))))
    return form


def _boundary(content_type: str) -> bytes:
    """The boundary in a Content-Type. Raises `MalformedRequest`."""
    if len(content_type) > _MAX_TYPE_BYTES:
        raise MalformedRequest(f"a form's Content-Type may have at most {_MAX_TYPE_BYTES} bytes")
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise MalformedRequest("a form's Content-Type needs a valid boundary")
    return boundary


def _parts(body: bytes | bytearray, boundary: bytes) -> Iterator[slice]:
    """Yield where each part is, without what is before the first and after the last."""
    delimiter = b"\r\n--" + boundary
    if body.startswith(delimiter[2:]):
        place = len(delimiter) - 2
    else:
        place = _found(body, delimiter, 0) + len(delimiter)
    while not body.startswith(b"--", place):
        line_end = body.find(b"\r\n", place, place + _MAX_PADDING_BYTES)
        if line_end < 0 or body[place:line_end].strip(b" \t"):
            raise MalformedRequest("the form's boundary occurs in a part")
        end = _found(body, delimiter, line_end)
        yield slice(line_end, end)
        place = end + len(delimiter)


def _found(body: bytes | bytearray, delimiter: bytes, start: int) -> int:
    place = body.find(delimiter, start)
    if place < 0:
        raise MalformedRequest("the form is incomplete, or its boundary is not the announced one")
    return place


def _headers(body: bytes | bytearray, part: slice) -> tuple[dict[str, str], int]:
    """A part's headers by their names in lower case, and where its content begins."""
    # The delimiter may follow the empty line directly.
    stop = min(part.stop + 2, part.start + _MAX_HEAD_BYTES)
    end = body.find(b"\r\n\r\n", part.start, stop)
    if end < 0:
        raise MalformedRequest(f"the headers of a part have no end within {_MAX_HEAD_BYTES} bytes")
    headers = {}
    for line in _FOLD.sub(b" ", body[part.start : end]).split(b"\r\n"):
        name, _, value = line.partition(b":")
        headers[name.strip().lower().decode("latin-1")] = value.strip().decode("latin-1")
    return headers, end + 4


def _filename(headers: dict[str, str], parameters: dict[bytes, bytes]) -> str | None:
    """The name of a part's file, which may be empty; None if the part is text."""
    disposition = headers["content-disposition"]
    if extended := _EXTENDED_NAME.search(disposition):
        return _text(unquote_to_bytes(extended[1].strip('"')))
    if b"filename" in parameters:
        return _text(parameters[b"filename"])
    # RFC 7578, section 4.2: a file should have a name, but need not; the default type is text.
    a_file = not headers.get("content-type", "text/").lower().startswith(("text/", "multipart/"))
    return "" if a_file or _ANY_EXTENDED_NAME.search(disposition) else None


def _decoded(content: memoryview, headers: dict[str, str]) -> memoryview:
    """A part's content. RFC 7578 deprecates all encodings but no encoding; base64 is in use."""
    if headers.get("content-transfer-encoding", "").lower() != "base64":
        return content
    try:
        return memoryview(binascii.a2b_base64(content))
    except binascii.Error as exc:
        raise MalformedRequest("a part of the form is not valid base64") from exc


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
