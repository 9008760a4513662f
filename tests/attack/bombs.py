"""One request of each kind that once ended the service, took its memory or stalled it."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from service.artefact import voc
from tests.attack.exchange import Request
from tests.attack.framing import PHOTO, form, post
from tests.benchmarks.wire import HOST
from tests.mutations import PNG_SIGNATURE, chunk

PERSON: Final = voc.CLASSES.index("person")
CAT: Final = voc.CLASSES.index("cat")

_MULTIPART: Final = "Content-Type: multipart/form-data; boundary=b"
_JSON: Final = "Accept: application/json"


# ---- files ---------------------------------------------------------------------------------------


def one_color(width: int, height: int, class_id: int = PERSON) -> bytes:
    """A PNG in a class's colour; few bytes, whatever its size."""
    color = bytes(int(one) for one in voc.PALETTE[class_id])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pack = zlib.compressobj(9)
    row = b"\0" + color * width
    data = b"".join([pack.compress(row) for _ in range(height)]) + pack.flush()
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def busy(width: int, height: int) -> bytes:
    """A JPEG with an edge at every few pixels: long run lengths and many polygons."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, len(voc.CLASSES), (height // 16 + 1, width // 16 + 1))
    pixels: npt.NDArray[np.uint8] = voc.PALETTE[ids].repeat(16, axis=0).repeat(16, axis=1)
    return _save(Image.fromarray(pixels[:height, :width]), "JPEG", quality=70)


def matrix_profile(elements: int) -> bytes:
    """A JPEG whose ICC profile lists one matrix ``elements`` times."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    matrix = b"matf\0\0\0\0" + struct.pack(">HH12f", 3, 3, *np.eye(3).flat, 0, 0, 0)
    places = struct.pack(">II", 16 + 8 * elements, len(matrix)) * elements
    program = b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, elements) + places + matrix
    count = struct.unpack(">I", profile[128:132])[0]
    table = bytearray(struct.pack(">I", count + 1))
    for at in range(132, 132 + 12 * count, 12):
        name, place, size = struct.unpack(">4sII", profile[at : at + 12])
        table += struct.pack(">4sII", name, place + 12, size)
    body = profile[132 + 12 * count :]
    table += struct.pack(">4sII", b"D2B0", 144 + 12 * count + len(body), len(program))
    whole = profile[4:128] + bytes(table) + body + program
    icc_profile = struct.pack(">I", len(whole) + 4) + whole
    return _save(Image.new("RGB", (16, 16), (99, 9, 9)), "JPEG", icc_profile=icc_profile)


def tiles(width: int, tile_width: int, tile_height: int, count: int) -> bytes:
    """A TIFF one pixel high in ``count`` tiles that are all the same bytes of Zstandard."""
    size = tile_width * tile_height
    data = bytearray(struct.pack("<IBI", 0xFD2FB528, 0xA0, size))
    while size:
        block = min(size, 2**17)
        size -= block
        data += struct.pack("<I", block << 3 | 2 | (not size))[:3] + b"\0"
    lists = struct.pack(f"<{count}I", *[8] * count), struct.pack(f"<{count}I", *[len(data)] * count)
    after = 8 + len(data) + len(lists[0]) + len(lists[1])
    places = [8 + len(data), 8 + len(data) + len(lists[0])] if count > 1 else [8, len(data)]
    tags = [(256, width), (257, 1), (258, 8), (259, 50000), (262, 1), (277, 1)]
    tags += [(322, tile_width), (323, tile_height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    entries += b"".join(
        struct.pack("<HHII", tag, 4, count, place)
        for tag, place in zip((324, 325), places, strict=True)
    )
    directory = struct.pack("<H", len(tags) + 2) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", after) + bytes(data) + b"".join(lists) + directory


def scans(frame: int, count: int, *, refine: bool) -> bytes:
    """A JPEG of 1x65500 pixels whose every scan visits all blocks, with next to no data.

    ``frame``: marker of the start of the frame, 0xC2 for Huffman codes, 0xCA for arithmetic ones.
    """

    def segment(marker: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body

    factors = (0x11,) if refine else (0x41, 0x41, 0x11)
    parts = b"".join(bytes([n + 1, factor, 0]) for n, factor in enumerate(factors))
    every = b"".join(bytes([n + 1, 0]) for n in range(len(factors)))
    every = bytes([len(factors)]) + every
    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    head += segment(frame, struct.pack(">BHHB", 8, 65500, 1, len(factors)) + parts)
    head += segment(0xC4, b"\0\1" + bytes(16)) + segment(0xC4, b"\x10\1\1" + bytes(14) + b"\xe0\0")
    head += segment(0xDA, every + b"\0\0\1") + b"\0"
    if refine:
        first = segment(0xDA, b"\1\1\0\1\x3f\1") + b"\x7f\xff\0"
        return (
            head
            + first
            + (segment(0xDA, b"\1\1\0\1\x3f\x10") + b"\x7f\xff\0") * count
            + b"\xff\xd9"
        )
    return head + segment(0xDA, every + b"\0\0\x10") * count + b"\xff\xd9"


def _save(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


# ---- messages ------------------------------------------------------------------------------------


def label_studio(port: int, name: str, config: str, images: list[bytes], path: str) -> Request:
    """A request of Label Studio's with ``images``, to ``path`` below its own."""
    uris = ["data:image/png;base64," + base64.b64encode(one).decode() for one in images]
    message = {
        "tasks": [{"data": {"i": uri}} for uri in uris],
        "label_config": config,
        "schema": config,
    }
    body = json.dumps(message).encode()
    return Request(name, post(port, f"/label-studio/{path}", body), photos=len(images))


def configuration(labels: str) -> str:
    """A labelling configuration with these labels."""
    return (
        '<View><Image name="i" value="$i"/><BrushLabels name="b" toName="i">'
        f"{labels}</BrushLabels></View>"
    )


def same_class(labels: int) -> str:
    """A labelling configuration of many labels for one class."""
    each = '<Label value="{:x}" predicted_values="background,person"/>'
    return configuration("".join(map(each.format, range(labels))))


def binary_mask(port: int, model: str, image: bytes) -> Request:
    """An image file for /v2, whose answer has a byte for each pixel."""
    tensor = {
        "name": "image",
        "shape": [1],
        "datatype": "BYTES",
        "parameters": {"binary_data_size": len(image) + 4},
    }
    outputs = [{"name": "mask", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    body = head + struct.pack("<I", len(image)) + image
    length = f"Inference-Header-Content-Length: {len(head)}"
    return Request("mask as binary data", post(port, infer(model), body, length))


# ---- single requests -----------------------------------------------------------------------------


def infer(model: str) -> str:
    """The path of the Open Inference Protocol."""
    return f"/v2/models/{model}/infer"


def cheap(port: int, model: str) -> list[Request]:
    """The rows that one request shows and that are quick to make and to answer."""
    errors = b"0," * 2_000_000
    strings = ["a" * 10_000, *["1"] * 100_000]
    tensor = {"name": "image", "shape": [4, 4, 3], "datatype": "UINT8", "data": strings}
    config = same_class(5200)
    predict = "/label-studio/predict"
    chunked = f"POST /segment HTTP/1.1\r\nHost: {HOST}:{port}\r\nTransfer-Encoding: chunked\r\n\r\n"
    size = b"%x" % len(PHOTO)
    return [
        Request("C1 matrices in a profile", post(port, "/segment", matrix_profile(60_000))),
        Request("C2 a tile of 2 GiB", post(port, "/segment", tiles(16, 46336, 46336, 1))),
        Request("C2 62,500 tiles", post(port, "/segment", tiles(1_000_000, 16, 2**20, 62_500))),
        label_studio(port, "C4 5,200 labels of a class", config, [busy(1000, 1000)], "predict"),
        Request(
            "H1 a long string", post(port, infer(model), json.dumps({"inputs": [tensor]}).encode())
        ),
        Request("H2 errors in /v2", post(port, infer(model), b'{"inputs":[' + errors + b"0]}")),
        Request(
            "H2 errors in tasks",
            post(port, predict, b'{"label_config":"","tasks":[' + errors + b"0]}"),
        ),
        Request("H6 arithmetic scans", post(port, "/segment", scans(0xCA, 7600, refine=False))),
        Request("H6 refining scans", post(port, "/segment", scans(0xC2, 7600, refine=True))),
        label_studio(port, "M2 a long configuration", config[:260_000], [PHOTO], "setup"),
        Request(
            "M3 100,000 tasks",
            post(
                port,
                predict,
                json.dumps(
                    {"tasks": [{"data": {}}] * 100_000, "label_config": same_class(1)}
                ).encode(),
            ),
        ),
        label_studio(port, "M3 250 tasks", same_class(2), [PHOTO] * 250, "predict"),
        *(
            Request(
                f"charset {codec}",
                post(port, path, form(PHOTO), f"{_MULTIPART}; charset={codec}"),
            )
            for codec in ("zlib", "hex", "idna", "punycode", "undefined", "utf-7", "none")
            for path in ("/segment", "/segment/batch")
        ),
        Request(
            "a length of 5,000 zeros",
            post(port, "/segment", PHOTO, length="0" * 5000 + str(len(PHOTO))),
        ),
        Request(
            "100 KB of chunk extension",
            chunked.encode() + size + b";" + b"a" * 100_000 + b"\r\n" + PHOTO + b"\r\n0\r\n\r\n",
            refused=True,
        ),
        Request(
            "1.2 MB of trailers",
            b"".join(
                [
                    chunked.encode(),
                    size,
                    b"\r\n",
                    PHOTO,
                    b"\r\n0\r\n",
                    b"X: a\r\n" * 200_000,
                    b"\r\n",
                ]
            ),
            refused=True,
        ),
        Request(
            "a foreign Host",
            post(port, "/segment", PHOTO, host="attacker.example"),
            refused=True,
        ),
        Request(
            "a foreign Origin",
            post(port, "/segment", PHOTO, "Origin: https://attacker.example"),
            refused=True,
        ),
        Request("half-closed", post(port, "/segment", PHOTO), half_closed=True),
    ]


def large(port: int) -> list[Request]:
    """The rows that need millions of pixels, one request each."""
    line, column = one_color(50_000_000, 1), one_color(1, 50_000_000)
    polygons = "/segment?view=json&mask=polygons"
    return [
        Request("C3 polygons of a line", post(port, polygons, line, _JSON)),
        Request("C3 polygons of a column", post(port, polygons, column, _JSON)),
        Request("C3 mask of a line", post(port, "/segment", line)),
        Request(
            "C3 polygons of many regions",
            post(port, f"{polygons}&max_side=1280", busy(7000, 7000), _JSON),
        ),
        label_studio(port, "C4 of 49 MP", same_class(5200), [busy(7000, 7000)], "predict"),
    ]
