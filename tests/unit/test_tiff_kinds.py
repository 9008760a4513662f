"""Grey TIFFs of every depth, where zero is black and where it is white."""

import struct

import numpy as np
import numpy.typing as npt
import pytest

from service.images.decoding import decode

RAMP = np.tile(np.arange(16), (4, 1))
LEVELS = (np.arange(16) * 17).tolist()


def tiff(
    order: str, data: bytes, bits: int, photometric: int, *, sample_format: int = 1, big: bool
) -> bytes:
    """A grey TIFF of 4 rows of 16 samples, in one strip."""
    head = 16 if big else 8
    fields = [(256, 16), (257, 4), (258, bits), (259, 1), (262, photometric), (273, head)]
    fields += [(277, 1), (278, 4), (279, len(data)), (339, sample_format)]
    layout = order + ("HHQH6x" if big else "HHIH2x")
    entries = b"".join(struct.pack(layout, tag, 3, 1, value) for tag, value in fields)
    mark = b"II" if order == "<" else b"MM"
    at = head + len(data)
    start = struct.pack(
        order + ("2sHHHQ" if big else "2sHI"), mark, *((43, 8, 0) if big else (42,)), at
    )
    count = struct.pack(order + ("Q" if big else "H"), len(fields))
    return start + data + count + entries + bytes(8)


def packed(bits: int) -> bytes:
    """The ramp in ``bits`` bits a sample, most significant first."""
    row = "".join(f"{n * ((1 << bits) - 1) // 15:0{bits}b}" for n in range(16))
    return int(row, 2).to_bytes(len(row) // 8) * 4


def as_bytes(order: str, samples: npt.NDArray[np.generic]) -> bytes:
    """Samples in a byte order."""
    return samples.astype(samples.dtype.newbyteorder(order)).tobytes()  # type: ignore[arg-type]


KINDS = [
    *[("<", bits, 1, packed(bits)) for bits in (4, 8, 12)],
    *[(">", bits, 1, packed(bits)) for bits in (4, 8)],
    *[(order, 16, 1, as_bytes(order, (RAMP * 4369).astype(np.uint16))) for order in "<>"],
    *[(order, 16, 2, as_bytes(order, (RAMP * 1000).astype(np.int16))) for order in "<>"],
    ("<", 32, 1, as_bytes("<", (RAMP * 1000).astype(np.uint32))),
    *[(order, 32, 2, as_bytes(order, (RAMP * 1000).astype(np.int32))) for order in "<>"],
    *[(order, 32, 3, as_bytes(order, (RAMP / 15).astype(np.float32))) for order in "<>"],
]


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    ("order", "bits", "sample_format", "data", "big"),
    # Pillow reads no BigTIFF whose first byte is the most significant.
    [(*kind, big) for kind in KINDS for big in (False, True) if not (big and kind[0] == ">")],
)
def test_zero_is_black_or_white(
    order: str, bits: int, sample_format: int, data: bytes, photometric: int, big: bool
) -> None:
    """By the file, at any depth; the greatest sample of its depth is the other one."""
    file = tiff(order, data, bits, photometric, sample_format=sample_format, big=big)
    wanted = LEVELS if photometric else LEVELS[::-1]
    found = decode(file, 1000).pixels
    assert np.abs(found[..., 0] - np.array(wanted, dtype=int)).max() <= 1
    assert (found == found[..., :1]).all()


def test_zero_is_white_in_a_scanned_page() -> None:
    """The usual form of a fax: one bit."""
    file = tiff("<", bytes([0xF0, 0x0F] * 4), 1, 0, big=False)
    assert decode(file, 1000).pixels[0, :, 0].tolist() == [0] * 4 + [255] * 8 + [0] * 4
