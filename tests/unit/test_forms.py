"""Which multipart forms are read, and what is in them."""

import base64

import pytest

from service.errors import MalformedRequest
from service.http.forms import MAX_FIELD_BYTES, MAX_FIELDS, read_form

TYPE = "multipart/form-data; boundary=x"
IMAGE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
NOTE = b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\n'
END = b"\r\n--x--\r\n"


def read(content_type: str, body: bytes) -> list[tuple[str, str | bytes]]:
    """The names of a form's fields and files, and what is in them; fields first."""
    form = read_form(content_type, body, max_files=2)
    return [*form.fields, *((one.field, bytes(one.content)) for one in form.files)]


def named(headers: str) -> str | None:
    """The name of the file in a part with these headers; None if the part is text."""
    body = f"--x\r\n{headers}\r\n\r\n1".encode("latin-1") + END
    return next((one.name for one in read_form(TYPE, body, 1).files), None)


@pytest.mark.parametrize(
    "charset",
    [
        *("utf-8", "us-ascii", "latin-1", "utf-7", "utf-16", "idna", "punycode", "undefined"),
        *("hex", "zlib", "bz2", "base64", "rot13", "unicode_escape", "raw_unicode_escape"),
        *("mbcs", "nonsense", "", "\xff", "utf-8\0"),
    ],
)
def test_the_charset_parameter_is_ignored(charset: str) -> None:
    """RFC 7578 defines none; names and values are UTF-8, and no codec of Python runs on them."""
    body = NOTE + "é%s".encode() + b"\r\n" + IMAGE + b"\xff\x00" + END
    assert read(f"{TYPE}; charset={charset}", body) == [("note", "é%s"), ("image", b"\xff\x00")]


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ("name=image; filename=a.png", "a.png"),
        ('name="image"; filename=""', ""),
        ('name="image"; filename="caf\xc3\xa9.png"', "café.png"),
        ('name="image"; filename="\xff\xfe.png"', "\xff\xfe.png"),
        (r'name="image"; filename="C:\photos\a.png"', "a.png"),
        (r'name="image"; filename="a \"b\"; c.png"', 'a "b"; c.png'),
        ("name=image; filename*=utf-8''f%C3%B6to.png", "föto.png"),
        ("name=image; FileName*=UTF-8'en'f%C3%B6to.png; filename=foto.png", "föto.png"),
        ("name=image; filename=foto.png; filename*=UTF-8''", ""),
        ("name=image; filename*=hex''00; filename=a.png", "a.png"),
        ("name=image; filename*=utf-16''%ff", ""),
        ('name="image"; filename="a.png"; charset=idna', "a.png"),
        ('name="image"; filename*0="a"; filename="b"', "b"),
        ('name="image"; size=3', None),
    ],
)
def test_the_name_of_a_file(disposition: str, name: str | None) -> None:
    """Also in RFC 8187's form, in UTF-8 alone: a part's parameters choose no codec."""
    headers = f"Content-Disposition: form-data; {disposition}\r\nX-A: charset=hex"
    assert named(headers) == name


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ('CONTENT-DISPOSITION:form-data; name="image"\r\ncontent-type:image/png', ""),
        ('Content-Type: image/png\r\nContent-Disposition: Form-Data; name="image"', ""),
        ('Content-Disposition: form-data; name="image"\r\nContent-Type: text/plain', None),
        ('Content-Disposition: form-data;\r\n\tname="image";\r\n filename="a.png"', "a.png"),
    ],
)
def test_the_headers_of_a_part(headers: str, name: str | None) -> None:
    """In any case and order, and folded. A file need not have a name; a part's default is text."""
    assert named(headers) == name


@pytest.mark.parametrize("encoding", ["binary", "8bit", "7bit", "BASE64"])
def test_the_encoding_of_a_part(encoding: str) -> None:
    """RFC 7578 deprecates the header; base64 is decoded."""
    content = base64.encodebytes(b"\xff\x00" * 60) if encoding == "BASE64" else b"\xff\x00" * 60
    head = IMAGE.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: %s\r\n\r\n")
    assert read(TYPE, head % encoding.encode() + content + END) == [("image", b"\xff\x00" * 60)]


def test_wrong_base64_in_a_part() -> None:
    """It is a malformed form."""
    head = IMAGE.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n")
    with pytest.raises(MalformedRequest, match="base64"):
        read(TYPE, head + b"a" + END)


@pytest.mark.parametrize(
    "boundary",
    ["", '""', '"x;y"', "é", "x\\", '"a\tb"', "y" * 257, '"x "', "y" * 2000, 'x" ; boundary="'],
)
def test_an_invalid_boundary(boundary: str) -> None:
    """RFC 2046 lists the characters of a boundary; ours may have 256."""
    with pytest.raises(MalformedRequest):
        read(f"multipart/form-data; boundary={boundary}", IMAGE + b"1" + END)


@pytest.mark.parametrize("boundary", ["x", '"x"', "y" * 256, "'()+_,-./:=?", '"a b"'])
@pytest.mark.parametrize("parameter", ["boundary", "BOUNDARY"])
def test_a_valid_boundary(boundary: str, parameter: str) -> None:
    """Quoted or not, up to 256 characters."""
    body = (IMAGE + b"1" + END).replace(b"--x", b"--" + boundary.strip('"').encode())
    found = read(f"Multipart/Form-Data ;{parameter}={boundary}", body)
    assert found == [("image", b"1")]


@pytest.mark.parametrize(
    "content",
    [b"", b"\r\n", b"\r\n-", b"\r\n--", b"--y", b"\r\n--y", b"\r\r\n--\r\n", b"\n--x\n--x--"],
)
def test_what_resembles_a_delimiter(content: bytes) -> None:
    """It belongs to the part."""
    assert read(TYPE, IMAGE + content + END) == [("image", content)]


def test_a_part_without_content() -> None:
    """With and without the empty line's own end."""
    assert read(TYPE, IMAGE[:-2] + END) == [("image", b"")]
    assert read(TYPE, IMAGE + END) == [("image", b"")]


@pytest.mark.parametrize("after", [b"A", b"\r", b"\n", b"-", b"-\r\n", b"x", b" " * 2000])
def test_a_delimiter_with_something_else_behind_it(after: bytes) -> None:
    """400: RFC 2046 forbids it in a part."""
    with pytest.raises(MalformedRequest, match="occurs in a part"):
        read(TYPE, IMAGE + b"1\r\n--x" + after + b"2" + END)


@pytest.mark.parametrize("before", [b"", b"\r\n", b"preamble\r\n", b"a\r\n--y\r\n"])
@pytest.mark.parametrize("padding", [b"", b" ", b"\t  "])
@pytest.mark.parametrize("after", [b"", b"\r\n", b" \t\r\nepilogue\r\n--x\r\n"])
def test_what_is_legal_around_parts(before: bytes, padding: bytes, after: bytes) -> None:
    """RFC 2046, section 5.1.1: a preamble, white space behind delimiters, and an epilogue."""
    body = IMAGE.replace(b"--x", b"--x" + padding) + b"1\r\n--x--"
    assert read(TYPE, before + body + after) == [("image", b"1")]


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b"--x", b"--x\r\n", IMAGE, IMAGE + b"1\r\n--x", (IMAGE + b"1" + END)[:-4]],
)
def test_an_incomplete_form(body: bytes) -> None:
    """It may have lost a part."""
    with pytest.raises(MalformedRequest):
        read(TYPE, body)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (IMAGE + b"1\r\n", "more than 2 files"),
        (NOTE + b"1\r\n", f"more than {MAX_FIELDS} fields"),
        (NOTE + b"1" * (MAX_FIELD_BYTES + 1) + b"\r\n", "has no filename"),
        (b"--x\r\n\r\n1\r\n", "no name"),
        (b"--x\r\nX: y\r\n\r\n1\r\n", "no name"),
        (b"--x\r\n" + b"X: y\r\n" * 2000 + b"\r\n1\r\n", "within 8192 bytes"),
    ],
)
def test_what_is_refused(part: bytes, reason: str) -> None:
    """The reason names the limit."""
    with pytest.raises(MalformedRequest, match=reason):
        read(TYPE, part * (MAX_FIELDS + 1) + b"--x--\r\n")
