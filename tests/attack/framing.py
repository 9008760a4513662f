"""Oddities of HTTP around a sound photo: heads, lengths, chunks, forms, parameters and paths."""

from __future__ import annotations

import encodings.aliases
import gzip
import random
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tests.artefacts import encode, two_class_photo
from tests.attack.exchange import Request
from tests.benchmarks.wire import HOST

Rng = random.Random

PHOTO: Final = encode(two_class_photo())

_BOUNDARY: Final = "b"
_TYPES: Final = ("*/*", "application/json", "image/webp", "application/zip", "x")
_CODECS: Final = sorted({*encodings.aliases.aliases, *encodings.aliases.aliases.values()})
_METHODS: Final = (
    *("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"),
    *("PRI", "get", "SEGMENT"),
)
_GZIP_BOMB: Final = gzip.compress(bytes(10_000_000))
_BY_UNICODE: Final = "%d9%a1%d9%a2%d9%a8"  # digits, to Python, in another script
_PATHS: Final = (
    *("/", "/segment", "/segment/batch", "/healthz", "/readyz", "/metrics", "/models", "/classes"),
    *("/docs", "/openapi.json", "/problems/x", "/v2", "/v2/health/ready", "/v2/models/tiny"),
    *("/v2/models/tiny/infer", "/v2/repository/index", "/hf/image-segmentation"),
    *("/label-studio/health", "/label-studio/setup", "/label-studio/webhook"),
    *("/static/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//segment", "/segment/"),
    *("/segment;a", "/\0", "/%00", "/%ff", "/%zz", "*", "segment", "?a", "#a"),
    *("http://127.0.0.1/segment", "https://evil.example/segment"),
)


def draw(rng: Rng, port: int) -> Request:
    """One request. Its name says what is odd."""
    name = rng.choice(list(_KINDS))
    request = _KINDS[name](rng, port)
    return replace(request, name=f"{name}: {request.name}")


def post(
    port: int,
    path: str,
    body: bytes,
    *headers: str,
    host: str | None = None,
    length: str | None = None,
) -> bytes:
    """A POST whose headers need not be well-formed; latin-1."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {HOST}:{port}" if host is None else f"Host: {host}",
        *headers,
        f"Content-Length: {len(body) if length is None else length}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1") + body


def form(content: bytes, *headers: str, disposition: str = 'name="image"; filename="a"') -> bytes:
    """A multipart form with one part."""
    head = "\r\n".join([f"Content-Disposition: form-data; {disposition}", *headers])
    return (
        f"--{_BOUNDARY}\r\n{head}\r\n\r\n".encode("latin-1")
        + content
        + f"\r\n--{_BOUNDARY}--\r\n".encode()
    )


def number(rng: Rng, most: int) -> int:
    """1 to ``most``, each magnitude as likely as another."""
    return int(most ** rng.random())


def _text(rng: Rng, most: int = 100_000) -> str:
    return rng.choice(
        ["a", "0", ",", ";", '"', "\\", "=", " ", "%", "\xe9", "a;", 'a="', "*/*,"]
    ) * (number(rng, most))


def _head(rng: Rng, port: int) -> Request:
    many = number(rng, 3000)
    headers = rng.choice(
        [
            [f"X-{n}: a" for n in range(many)],
            ["X: a"] * many,
            [f"X: {_text(rng, 1_000_000)}"],
            [f"{'X' * number(rng, 100_000)}: a"],
            ["X:" + " " * number(rng, 100_000) + "a"],
            ["X: a\r\n folded"],
            ["X : a"],
            [": a"],
            ["X"],
            ["X: \0"],
            ["X\0: a"],
            ["\xe9: a"],
            ["X: a\rb"],
            ["X: a\nY: b"],
            [f"Host: {HOST}"],
            [f"Content-Length: {len(PHOTO)}"],
            ["Content-Length: 1"],
            ["Transfer-Encoding: chunked"],
            ["Transfer-Encoding: gzip"],
        ]
    )
    # Closed, so that a request which is read as longer than it is ends too.
    return Request(headers[0][:30], post(port, "/segment", PHOTO, *headers), half_closed=True)


def _host(rng: Rng, port: int) -> Request:
    host = rng.choice(
        ["", "evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[::1]", "[", "a b",
         "localhost", f"LOCALHOST:{port}", "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:x", "@",
         "user@127.0.0.1", "127.1", "2130706433", "\xe9", "a" * number(rng, 30_000), "a,b", "%31"]
    )  # fmt: skip
    return Request(host[:30], post(port, "/segment", PHOTO, host=host))


def _line(rng: Rng, port: int) -> Request:
    rest = f"Host: {HOST}:{port}\r\n\r\n"
    line = rng.choice(
        [
            f"{rng.choice(_METHODS)} {rng.choice(_PATHS)} HTTP/1.1\r\n",
            f"{'A' * number(rng, 100_000)} / HTTP/1.1\r\n",
            f"GET /{'a' * number(rng, 1_000_000)} HTTP/1.1\r\n",
            f"GET /{'%41' * number(rng, 10_000)} HTTP/1.1\r\n",
            f"GET /{'../' * number(rng, 3000)} HTTP/1.1\r\n",
            f"GET / HTTP/{rng.choice(['0.9', '1.0', '1.2', '2', '3.0', '11', 'x', ''])}\r\n",
            "GET /\r\n",
            "GET  /  HTTP/1.1\r\n",
            "GET / HTTP/1.1\n",
            "\r\n" * number(rng, 100_000) + "GET /healthz HTTP/1.1\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "\x16\x03\x01\x02\0\x01\0",
            "\0" * number(rng, 100_000),
        ]
    )
    return Request(line[:30], (line + rest).encode("latin-1"), half_closed=True)


def _length(rng: Rng, port: int) -> Request:
    size = str(len(PHOTO))
    length = rng.choice(
        ["0" * number(rng, 30_000) + size, "0" * number(rng, 30_000), "+" + size, "-" + size,
         f"{size}, {size}", f"{size},", "", " ", "0x10", "1e3", size + ".0",
         "9" * number(rng, 5000), str(2**63), str(2**64 + len(PHOTO)), "\xb2",
         str(len(PHOTO) + 1), "1"]
    )  # fmt: skip
    longer = length.isdecimal() and len(length) < 8 and int(length) > len(PHOTO)
    content = post(port, "/segment", PHOTO, length=length)
    return Request(length[:30], content, incomplete=longer, half_closed=True)


def _chunks(rng: Rng, port: int) -> Request:
    head = (
        f"POST /segment HTTP/1.1\r\nHost: {HOST}:{port}\r\n"
        f"Transfer-Encoding: {rng.choice(['chunked'] * 9 + ['Chunked', 'gzip, chunked', 'x'])}\r\n"
        "Trailer: X\r\n\r\n"
    ).encode()
    size = b"%x" % len(PHOTO)
    whole = size + b"\r\n" + PHOTO + b"\r\n"
    each = number(rng, 3000)
    name, body = rng.choice(
        [
            ("sound", whole + b"0\r\n\r\n"),
            ("extension", size + b";" + b"a" * each * 100 + whole[len(size) :] + b"0\r\n\r\n"),
            ("extensions", size + b";a=b" * each + whole[len(size) :] + b"0\r\n\r\n"),
            ("zeros", b"0" * each * 10 + whole + b"0\r\n\r\n"),
            ("trailers", whole + b"0\r\n" + b"X: a\r\n" * each * 50 + b"\r\n"),
            ("trailer", whole + b"0\r\nX: " + b"a" * each * 400 + b"\r\n\r\n"),
            ("tiny", b"".join(b"1\r\n%c\r\n" % one for one in PHOTO * 10) + b"0\r\n\r\n"),
            ("tiny with extensions", b"1;aaaaaaa\r\na\r\n" * each * 10 + b"0\r\n\r\n"),
            ("huge", b"f" * rng.choice([8, 15, 16, 17, 1000]) + b"\r\n" + PHOTO),
            ("negative", b"-1\r\n" + PHOTO),
            ("no size", b"\r\n" + PHOTO),
            ("bare newline", size + b"\n" + PHOTO + b"\n0\n\n"),
            ("no end", whole),
            ("a trailer without end", whole + b"0\r\nX: a"),
            ("a long end", whole + b"0\r\n" + b"\r" * each),
        ]
    )
    unfinished = name in ("huge", "no end", "a trailer without end", "a long end")
    return Request(name, head + body, incomplete=unfinished, half_closed=True)


def _form(rng: Rng, port: int) -> Request:
    codec = rng.choice([*_CODECS, "x", "\xe9", "a" * 10_000])
    many = number(rng, 20_000)
    part = form(PHOTO)[: -len(f"--{_BOUNDARY}--\r\n")]
    image = 'name="image"; filename="a"'
    name, content_type, body = rng.choice(
        [
            (f"charset {codec}", f"multipart/form-data; boundary=b; charset={codec}", form(PHOTO)),
            (f"part's charset {codec}", "", form(PHOTO, f"Content-Type: a/b; charset={codec}")),
            (f"text in {codec}", "", form(b"a\xff", f"Content-Type: text/plain; charset={codec}",
                                          disposition='name="image"')),
            ("many images", "", part * min(many, 3000) + f"--{_BOUNDARY}--\r\n".encode()),
            ("many texts", "", form(b"a", disposition='name="a"')[:-7] * many + b"--b--\r\n"),
            ("a long text", "", form(b"a" * many * 100, disposition='name="image"')),
            ("headers of a part", "", form(PHOTO, *[f"X-{n}: a" for n in range(many)])),
            ("a header of a part", "", form(PHOTO, "X: " + "a" * many * 50)),
            ("a long name", "", form(PHOTO, disposition=f'name="{"a" * many}"; filename="a"')),
            ("a long file name", "", form(PHOTO, disposition=f'{image[:-2]}{_text(rng)}"')),
            ("parameters", "", form(PHOTO, disposition=image + "; a=b" * many)),
            ("filename*", "", form(PHOTO, disposition=f"{image}; filename*={codec}''%ff%00")),
            ("continuations", "", form(PHOTO, disposition=image + "".join(
                f"; filename*{n}=a" for n in range(many)))),
            ("a path", "", form(PHOTO, disposition='name="image"; filename="../../etc/passwd\0"')),
            ("no disposition", "", b"--b\r\n\r\n" + PHOTO + b"\r\n--b--\r\n"),
            ("an encoded part", "", form(PHOTO, "Content-Transfer-Encoding: base64")),
            ("_charset_", "", form(codec.encode("latin-1"), disposition='name="_charset_"')),
            ("no end", "", form(PHOTO)[:-9]),
            ("a preamble", "", b"a" * many * 50 + b"\r\n" + form(PHOTO)),
            ("an epilogue", "", form(PHOTO) + b"a" * many * 50),
            ("dashes", "", b"\r\n--" * many + form(PHOTO)),
            ("nothing", "", b""),
            ("only an end", "", b"--b--\r\n"),
            ("another boundary", "multipart/form-data; boundary=c", form(PHOTO)),
            ("no boundary", "multipart/form-data", form(PHOTO)),
            ("an empty boundary", 'multipart/form-data; boundary=""', form(PHOTO)),
            ("a long boundary", "multipart/form-data; boundary=" + "b" * many, form(PHOTO)),
            ("two boundaries", "multipart/form-data; boundary=b; boundary=c", form(PHOTO)),
            ("an odd boundary", f'multipart/form-data; boundary="{_text(rng, 4000)}"', form(PHOTO)),
            ("multipart/mixed", "multipart/mixed; boundary=b", form(PHOTO)),
            ("urlencoded", "application/x-www-form-urlencoded", b"image=a&" * many),
        ]
    )  # fmt: skip
    content_type = content_type or "multipart/form-data; boundary=b"
    path = rng.choice(["/segment", "/segment", "/segment/batch"])
    return Request(name, post(port, path, body, f"Content-Type: {content_type}"))


def _header(rng: Rng, port: int) -> Request:
    many = number(rng, 5000)
    name, value = rng.choice(
        [
            ("Accept", "image/png;q=0.1," * many),
            ("Accept", rng.choice(["*", "a/b;q=nan", "a/b;q=-1", "a/b;q=1e999", ";", "\xe9"])),
            ("Accept", ",".join(f"a{n}/b;q=0.{n}" for n in range(many))),
            ("Accept-Language", "de," * many),
            ("Accept-Encoding", rng.choice(["gzip", "gzip, br, zstd", "*;q=0"])),
            ("Content-Encoding", rng.choice(["gzip", "br", "deflate", "gzip," * many])),
            ("Content-Type", _text(rng, 30_000)),
            ("Content-Type", "image/png; " + "a=b;" * many),
            ("Content-Type", rng.choice(["", "/", "application/json", "text/html; charset=utf-7"])),
            ("Expect", rng.choice(["100-continue", "101-continue", "x", "a" * many])),
            ("Range", "bytes=" + "0-1," * many),
            ("If-None-Match", '"a",' * many),
            ("If-Modified-Since", rng.choice(["x", "Sat, 99 Foo 99999 99:99:99 GMT"])),
            ("Connection", rng.choice(["upgrade", "close", "keep-alive, close", "x," * many])),
            ("Upgrade", rng.choice(["websocket", "h2c", "x"])),
            ("X-Request-ID", rng.choice(["\xe9", "a" * many, "", "a b", "%0d%0aX: y"])),
            ("X-Forwarded-For", "1.2.3.4, " * many),
            ("X-Forwarded-For", rng.choice(["x", "::", "1.2.3.4:99999", "\xe9", "::1%lo", ","])),
            ("X-Forwarded-Proto", rng.choice(["https", "x", "a" * many])),
            ("Forwarded", "for=1.2.3.4," * many),
            ("traceparent", rng.choice(["00-" + "0" * many, "x", f"00-{'f' * 32}-{'f' * 16}"])),
            ("tracestate", "a=b," * many),
            ("baggage", "a=b," * many),
            ("Authorization", rng.choice(["Bearer", "Bearer " + "a" * many, "Basic \xe9", ""])),
            ("Origin", rng.choice(["https://evil.example", "null", "x", "\xe9", "a" * many])),
            ("Cookie", "a=b;" * many),
            ("Sec-Fetch-Site", rng.choice(["cross-site", "same-origin", "x"])),
            ("Inference-Header-Content-Length", rng.choice(["0", "-1", "9" * many, "\xb2"])),
            ("Access-Control-Request-Method", "POST"),
        ]
    )  # fmt: skip
    body = rng.choice([PHOTO, PHOTO, _GZIP_BOMB, zlib.compress(PHOTO)])
    content = post(port, rng.choice(["/segment", "/segment", "/hf/image-segmentation"]), body,
                   f"{name}: {value}")  # fmt: skip
    return Request(f"{name} {value[:20]}", content)


def _parameters(rng: Rng, port: int) -> Request:
    many = number(rng, 2000)
    value = rng.choice(
        ["", "nan", "inf", "-0", "1e999", "0x10", "9" * many, "-1", "0.1e-999", "%00", "%ff", "%",
         "\xe9", "mask", "overlay", "cutout", "confidence", "json", "polygons", "rle", "png",
         "none", "64", "63", "512", "2048", "2049", "1_000", _BY_UNICODE, "person,cat", ",",
         "," * many, "person," * many, "a" * many, "../tiny", "tiny%2f..", "tiny", "true", "[]",
         "{}"]
    )  # fmt: skip
    key = rng.choice(["view", "alpha", "classes", "max_side", "mask", "model", "x", "", "view[]"])
    query = rng.choice([f"{key}={value}", f"{key}={value}&" * many, f"{key}=a&{key}={value}", key])
    path = rng.choice(
        ["/segment", "/segment", "/segment/batch", "/hf/image-segmentation", "/classes"]
    )
    body, headers = PHOTO, [f"Accept: {rng.choice(_TYPES)}"]
    if path == "/segment/batch":
        body = form(PHOTO)
        headers.append("Content-Type: multipart/form-data; boundary=b")
    return Request(f"{path}?{query[:30]}", post(port, f"{path}?{query}", body, *headers))


def _cut(rng: Rng, port: int) -> Request:
    whole = post(port, "/segment", PHOTO)
    return Request("", whole[: rng.randrange(1, len(whole))], incomplete=True)


def _pipelined(rng: Rng, port: int) -> Request:
    one = rng.choice(
        [post(port, "/segment", PHOTO), f"GET /healthz HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()]
    )
    return Request("", one * number(rng, 500))


_KINDS: Final[dict[str, Callable[[Rng, int], Request]]] = {
    "head": _head,
    "host": _host,
    "request line": _line,
    "length": _length,
    "chunks": _chunks,
    "form": _form,
    "header": _header,
    "parameters": _parameters,
    "cut": _cut,
    "pipelined": _pipelined,
}
