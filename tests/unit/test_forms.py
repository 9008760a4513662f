"""What Starlette's form parser must not see."""

import pytest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from service.errors import MalformedRequest
from service.http.forms import open_form

TYPE = "multipart/form-data; boundary=x"
IMAGE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
NOTE = b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\n'
END = b"\r\n--x--\r\n"


def request(content_type: str, body: bytes, piece: int) -> Request:
    """A request whose body arrives in pieces of ``piece`` bytes."""
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)]

    async def receive() -> Message:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    headers = [(b"content-type", content_type.encode("latin-1"))]
    scope = {"type": "http", "method": "POST", "headers": headers, "app": None}
    return Request(scope, receive)


async def read(content_type: str, body: bytes, piece: int = 65536) -> list[tuple[str, str | bytes]]:
    """The names of a form's fields and files, and what is in them."""
    opened = open_form(
        request(content_type, body, piece), max_files=2, max_fields=2, max_part_size=1024
    )
    async with opened as form:
        return [
            (name, await value.read() if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]


@pytest.mark.parametrize(
    "charset",
    [
        *("utf-8", "us-ascii", "latin-1", "utf-7", "utf-16", "idna", "punycode", "undefined"),
        *("hex", "zlib", "bz2", "base64", "rot13", "unicode_escape", "raw_unicode_escape"),
        *("mbcs", "nonsense", "", "\xff", "utf-8\0"),
    ],
)
@pytest.mark.anyio
async def test_the_charset_parameter_is_ignored(charset: str) -> None:
    """RFC 7578 defines none; names and values are UTF-8, and no codec of Python runs on them."""
    body = NOTE + "é%s".encode() + b"\r\n" + IMAGE + b"\xff\x00" + END
    found = await read(f"{TYPE}; charset={charset}", body)
    assert found == [("note", "é%s"), ("image", b"\xff\x00")]


@pytest.mark.parametrize(
    "disposition",
    [
        "name=image; filename*=hex''00; filename=a.png",
        "name=image; filename*=utf-16''%ff; filename=a.png",
        'name="image"; filename="a.png"; charset=idna',
        'name="image"; filename="\xff\xfe.png"',
        'name="image"; filename*0="a"; filename="b"; filename=c',
    ],
)
@pytest.mark.anyio
async def test_a_parts_own_parameters_choose_no_codec(disposition: str) -> None:
    """Extended parameters are ignored: RFC 7578, section 4.2."""
    part = f"--x\r\nContent-Disposition: form-data; {disposition}\r\nContent-Type: a; charset=hex"
    assert await read(TYPE, part.encode("latin-1") + b"\r\n\r\n1" + END) == [("image", b"1")]


@pytest.mark.parametrize(
    "boundary",
    ["", '""', '"x;y"', "é", "x\\", '"a\tb"', "y" * 257, '"x "', "y" * 2000, 'x" ; boundary="'],
)
@pytest.mark.anyio
async def test_an_invalid_boundary(boundary: str) -> None:
    """RFC 2046 lists the characters of a boundary; the parser's limit of 256 holds."""
    with pytest.raises(MalformedRequest):
        await read(f"multipart/form-data; boundary={boundary}", IMAGE + b"1" + END)


@pytest.mark.parametrize("boundary", ["x", '"x"', "y" * 256, "'()+_,-./:=?", '"a b"'])
@pytest.mark.anyio
async def test_a_valid_boundary(boundary: str) -> None:
    """Quoted or not, as long as the parser allows."""
    body = (IMAGE + b"1" + END).replace(b"--x", b"--" + boundary.strip('"').encode())
    found = await read(f"multipart/form-data; boundary={boundary}", body)
    assert found == [("image", b"1")]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 65536])
@pytest.mark.parametrize(
    "content",
    [b"", b"\r\n", b"\r\n-", b"\r\n--", b"--x", b"\r\n--y", b"\r\r\n--\r\n", b"\n--x\n--x--"],
)
@pytest.mark.anyio
async def test_what_resembles_a_delimiter(content: bytes, piece: int) -> None:
    """It belongs to the part, however the body is cut into pieces."""
    assert await read(TYPE, IMAGE + content + END, piece) == [("image", content)]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 65536])
@pytest.mark.parametrize("after", [b"A", b" \r\n", b"\t\r\n", b"\r", b"\n", b"-", b"-\r\n", b"x"])
@pytest.mark.anyio
async def test_a_delimiter_with_something_else_behind_it(after: bytes, piece: int) -> None:
    """400: the parser would read on byte by byte; RFC 2046 forbids it in a part."""
    with pytest.raises(MalformedRequest):
        await read(TYPE, IMAGE + b"1\r\n--x" + after + b"2" + END, piece)


@pytest.mark.parametrize("parts", [6, 1000])
@pytest.mark.anyio
async def test_more_parts_than_files_and_fields(parts: int) -> None:
    """Parts are counted before they are parsed."""
    with pytest.raises(MalformedRequest, match="too many parts"):
        await read(TYPE, b"--x\r\n\r\n" + b"\r\n--x\r\n\r\n" * (parts - 1) + END)


@pytest.mark.anyio
async def test_the_parsers_own_complaints() -> None:
    """They stay as they are."""
    with pytest.raises(HTTPException, match="Too many fields"):
        await read(TYPE, b"\r\n".join([NOTE + b"1"] * 3) + END)
