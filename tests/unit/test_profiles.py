"""Photos are converted by what their profile's curves and tables say, at a bounded cost."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from service.images.decoding import decode
from service.images.profiles import MAX_PROFILE_BYTES, simple_profile, srgb_conversion
from tests.mutations import PNG_SIGNATURE, chunk, save

CAP: Final = 1_000_000
SRGB: Final = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LEVELS: Final = np.arange(256, dtype=np.uint8)
CUBE: Final = np.stack(np.meshgrid(*[LEVELS[::17]] * 3), axis=-1).reshape(64, 64, 3)

# Columns of the primaries of sRGB, Adobe RGB (1998) and Display P3, adapted to D50.
PRIMARIES: Final = {
    "sRGB": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)),
    "Adobe": (
        (0.60974, 0.31111, 0.01947),
        (0.20528, 0.62567, 0.06087),
        (0.14919, 0.06322, 0.74457),
    ),
    "P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
}
D50: Final = (0.9642, 1.0, 0.8249)


def fixed(*values: float) -> bytes:
    """Numbers of 16 bits before and 16 after the point."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def xyz(values: tuple[float, float, float]) -> bytes:
    """A colour."""
    return b"XYZ \0\0\0\0" + fixed(*values)


def power(gamma: float) -> bytes:
    """A curve: a power of the level."""
    return b"para\0\0\0\0\0\0\0\0" + fixed(gamma)


def profile(
    tags: dict[bytes, bytes], space: bytes = b"RGB ", pcs: bytes = b"XYZ ", kind: bytes = b"mntr"
) -> bytes:
    """A profile of version 4 with these tags."""
    first = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", first + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    header = struct.pack(">I4sI", first + len(body), b"test", 0x04400000) + kind + space + pcs
    header += bytes(12) + b"acsp" + bytes(28) + fixed(*D50)
    return header.ljust(128, b"\0") + table + body


def named(name: str) -> bytes:
    """A profile's description."""
    text = name.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text


def rgb(primaries: str, gamma: float, **more: bytes) -> bytes:
    """A profile of matrix and curves."""
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, PRIMARIES[primaries]), strict=True))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), power(gamma))
    return profile(tags | {name.encode(): tag for name, tag in more.items()})


def grey(gamma: float) -> bytes:
    """A profile of one curve."""
    return profile({b"kTRC": power(gamma), b"wtpt": xyz(D50)}, b"GRAY")


def table(channels: int, seed: int = 0) -> bytes:
    """A table from random corners to Lab."""
    corners = np.random.default_rng(seed).integers(0, 65280, 3 * 2**channels)
    identity = struct.pack(">HH", 0, 65535)
    head = struct.pack(">BBBB9i", channels, 3, 2, 0, *(65536 * (n % 4 == 0) for n in range(9)))
    parts = (
        b"mft2\0\0\0\0",
        head,
        struct.pack(">HH", 2, 2),
        identity * channels,
        corners.astype(">u2").tobytes(),
        identity * 3,
    )
    return b"".join(parts)


def program(elements: int) -> bytes:
    """Multi-process elements: the same matrix, again and again."""
    matrix = b"matf\0\0\0\0" + struct.pack(">HH12f", 3, 3, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0)
    place = struct.pack(">II", 16 + 8 * elements, len(matrix))
    return b"mpet\0\0\0\0" + struct.pack(">HHI", 3, 3, elements) + place * elements + matrix


def by_little_cms(icc_profile: bytes, image: Image.Image) -> npt.NDArray[np.uint8]:
    """Convert by the whole profile."""
    whole = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(whole, srgb, image.mode, "RGB")
    return np.asarray(transform.apply(image))


def encoded(linear: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Linear light in [0, 1] as levels of sRGB."""
    curved = 1.055 * linear ** (1 / 2.4) - 0.055
    levels: npt.NDArray[np.float64] = np.rint(
        255 * np.where(linear <= 0.0031308, 12.92 * linear, curved)
    )
    return levels.astype(np.int64)


@pytest.mark.parametrize("primaries", ["Adobe", "P3"])
def test_what_cameras_and_screens_write_is_applied(primaries: str) -> None:
    """Exactly as by the whole profile, in a lossless file."""
    icc_profile = rgb(primaries, 2.2, desc=named("a camera"))
    image = Image.fromarray(CUBE)
    converted = decode(save(image, "PNG", icc_profile=icc_profile), CAP).pixels
    assert np.array_equal(converted, by_little_cms(icc_profile, image))
    assert np.abs(converted.astype(int) - CUBE).max() > 20


@pytest.mark.parametrize(("mode", "space", "channels"), [("RGB", b"RGB ", 3), ("CMYK", b"CMYK", 4)])
def test_a_table_is_applied(mode: str, space: bytes, channels: int) -> None:
    """Printers' and scanners' profiles, as by the whole profile."""
    icc_profile = profile({b"A2B0": table(channels)}, space, b"Lab ", b"prtr")
    random = np.random.default_rng(1).integers(0, 256, 64 * 64 * channels, dtype=np.uint8)
    image = Image.frombytes(mode, (64, 64), random.tobytes())
    converted = decode(save(image, "TIFF", icc_profile=icc_profile), CAP).pixels
    assert np.array_equal(converted, by_little_cms(icc_profile, image))
    plain = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(converted - plain).mean() > 10


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_curves_count_and_not_the_name(image_format: str) -> None:
    """Linear light is brightened, even by a profile that calls itself sRGB."""
    icc_profile = rgb("sRGB", 1.0, desc=named("sRGB-elle-V2-g10.icc"))
    options = {"lossless": True} if image_format == "WEBP" else {}
    for level in (3, 64, 200):
        image = Image.new("RGB", (16, 16), (level,) * 3)
        data = save(image, image_format, icc_profile=icc_profile, **options)
        expected = encoded(np.array(level / 255))
        assert np.abs(decode(data, CAP).pixels.astype(int) - expected).max() <= 2


def test_srgb_by_another_name_changes_nothing() -> None:
    """Rounding of curves is not applied to photos that are in sRGB already."""
    assert srgb_conversion(SRGB, "RGB") is None
    assert srgb_conversion(SRGB.replace(b"\0s\0R\0G\0B", b"\0x\0y\0z\0_"), "RGB") is None
    assert srgb_conversion(rgb("sRGB", 1.0), "RGB") is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda levels: Image.fromarray((levels >> 8).astype(np.uint8)),
        lambda levels: Image.merge("LA", [Image.fromarray((levels >> 8).astype(np.uint8))] * 2),
        Image.fromarray,
    ],
    ids=["L", "LA", "I;16"],
)
def test_grey_has_its_own_curve(make: Callable[[npt.NDArray[np.uint16]], Image.Image]) -> None:
    """Of 8 and 16 bits, with and without transparency."""
    levels = np.full((4, 4), 0x4040, dtype=np.uint16)
    image = make(levels)
    if image.mode == "LA":
        image.putalpha(255)
    data = save(image, "PNG", icc_profile=grey(1.0))
    expected = encoded(np.array(0x40 / 255))
    assert np.abs(decode(data, CAP).pixels.astype(int) - expected).max() <= 1


def test_dark_levels_of_16_bits_are_kept_apart() -> None:
    """The curve is applied before 16 bits become 8."""
    levels = np.array([[0, 20, 65, 130, 65535]], dtype=np.uint16)
    decoded = decode(save(Image.fromarray(levels), "PNG", icc_profile=grey(1.0)), CAP).pixels
    expected = encoded(levels / 65535.0)
    assert len(set(expected[0].tolist())) == 5
    assert np.abs(decoded[..., 0].astype(int) - expected).max() <= 1


def test_programs_are_left_out() -> None:
    """What an unbounded number of elements says is not asked; the matrix beside them is used."""
    bomb = rgb("Adobe", 2.2, D2B0=program(60_000), B2D0=program(60_000), A2B1=table(3))
    plain = rgb("Adobe", 2.2)
    assert simple_profile(bomb, "RGB") == simple_profile(plain, "RGB")
    image = Image.fromarray(CUBE)
    data = save(image, "PNG", icc_profile=bomb)
    assert np.array_equal(decode(data, CAP).pixels, by_little_cms(plain, image))
    only_program = profile({b"D2B0": program(60_000)})
    assert np.array_equal(decode(save(image, "PNG", icc_profile=only_program), CAP).pixels, CUBE)


def short_table() -> bytes:
    """A table with fewer numbers than its grid of 255 needs."""
    whole = bytearray(table(3))
    whole[10] = 255
    return bytes(whole)


@pytest.mark.parametrize(
    "icc_profile",
    [
        profile({b"A2B0": short_table()}, pcs=b"Lab "),
        profile({b"A2B0": table(4)}, pcs=b"Lab "),
        profile({b"A2B0": table(3)}, b"RGB ", b"Lab ", b"link"),
        profile({b"A2B0": table(3)}, b"15CL", b"Lab "),
        profile({b"rXYZ": xyz(D50)}),
        profile({}),
        rgb("Adobe", 2.2)[:140],
        rgb("Adobe", 2.2, pads=bytes(MAX_PROFILE_BYTES)),
    ],
)
def test_what_cannot_be_applied_is_ignored(icc_profile: bytes) -> None:
    """As viewers do: broken, for other colours, or far larger than any real one."""
    assert srgb_conversion(icc_profile, "RGB") is None


def test_a_profile_that_a_png_packs_too_well_is_ignored() -> None:
    """It is unpacked up to the limit only."""
    image = Image.fromarray(CUBE)
    data = save(image, "PNG")
    bomb = chunk(b"iCCP", b"k\0\0" + zlib.compress(rgb("Adobe", 2.2, pads=bytes(1 << 24))))
    at = len(PNG_SIGNATURE) + 25
    assert np.array_equal(decode(data[:at] + bomb + data[at:], CAP).pixels, CUBE)
