"""Decoding gives what viewers show, or an error."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg  # type: ignore[import-untyped]
from hypothesis import given, settings
from PIL import Image, ImageCms, ImageOps

from service.errors import (
    ImageError,
    ImageTooLarge,
    TooExpensive,
    UndecodableImage,
    UnsupportedImageType,
)
from service.images import decoding
from service.images.decoding import IMAGE_MEDIA_TYPES, DecodedPhoto, sniff
from service.images.headers import SCALING_MARGIN
from tests.artefacts import encode
from tests.mutations import PNG_SIGNATURE, chunk, hostile_files, interlaced_png, samples, save

# Pillow writes no HEIF.
WRITTEN = [name for name in IMAGE_MEDIA_TYPES if name != "HEIF"]
CAP = 1_000_000


def decode(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """A photo's own pixels."""
    return decoding.decode(data, max_pixels).pixels


def gradient(height: int = 48, width: int = 64) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8: smooth, and different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 / (width - 1), y * 255 / (height - 1), (x + y) * 255 / (width + height - 2))
    return np.stack(planes, axis=2).astype(np.uint8)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_exactly(image_format: str) -> None:
    """Every pixel is what was saved, as (H, W, 3) uint8, contiguous and writeable."""
    options = {"lossless": True} if image_format == "WEBP" else {}
    decoded = decode(encode(gradient(), image_format, **options), CAP)
    assert np.array_equal(decoded, gradient())
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


def test_jpeg_comes_back_closely() -> None:
    """Equal within the compression's error."""
    decoded = decode(encode(gradient(), "JPEG", quality=95, subsampling=0), CAP)
    assert np.abs(decoded.astype(int) - gradient()).mean() < 2


def test_every_allowed_format_is_sniffed() -> None:
    """The first bytes alone determine the format."""
    for name in WRITTEN:
        assert sniff(encode(gradient(), name)) == name


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF\0\0\0\0WAVE",
        b"P6 1 1 255 abc",
        b"BM is how this text begins, which is no bitmap.",
        save(Image.new("RGB", (4, 4)), "JPEG2000"),
        save(Image.new("RGB", (4, 4)), "ICO"),
        save(Image.new("RGB", (4, 4)), "TGA"),
    ],
)
def test_anything_else_is_unsupported(data: bytes) -> None:
    """Text, documents and formats that Pillow could open but the service does not allow."""
    with pytest.raises(UnsupportedImageType, match="JPEG, PNG, WEBP, BMP, GIF, TIFF"):
        decode(data, CAP)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(image_format: str, orientation: int) -> None:
    """All eight orientations come out as viewers turn them, in every format that has EXIF."""
    stored = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(stored, image_format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    decoded = decode(data, CAP)
    assert decoded.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    assert np.array_equal(decoded, expected)


def test_a_broken_exif_block_is_ignored() -> None:
    """The photo is still a photo."""
    data = save(Image.fromarray(gradient()), "PNG", exif=b"Exif\0\0nonsense")
    assert np.array_equal(decode(data, CAP), gradient())


def test_lab_tiff() -> None:
    """CIELAB, which Pillow converts only by its colour management, is not an error."""
    gray = np.full((8, 8), 100, dtype=np.uint8)
    lab = save(Image.merge("LAB", [Image.fromarray(gray)] * 3), "TIFF")
    decoded = decode(lab, CAP)
    assert decoded.shape == (8, 8, 3)
    assert len(np.unique(decoded.reshape(-1, 3), axis=0)) == 1


def pillows(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a file with Pillow alone, upright."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return np.array(upright.convert("RGB"))


def noise(height: int = 48, width: int = 64) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 that compresses badly."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"quality": 100},
        {"keep_rgb": True},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_all_kinds_are_as_pillow_decodes_them(
    mode: str, options: dict[str, object]
) -> None:
    """With either decoder; both are libjpeg-turbo, whose versions differ by rounding."""
    data = save(Image.fromarray(noise()).convert(mode), "JPEG", **options)
    assert np.abs(decode(data, CAP).astype(int) - pillows(data)).max() <= 2


def damaged_but_shown(data: bytes) -> bytes:
    """A JPEG with missing pixels, which Pillow accepts and simplejpeg does not."""
    return data[:-40] + bytes(20) + data[-20:]


def odd_sampling(data: bytes) -> bytes:
    """A JPEG with 3x1 luma sampling, which simplejpeg does not know."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 11] + b"\x31" + data[frame + 12 :]


@pytest.mark.parametrize("change", [damaged_but_shown, odd_sampling])
def test_pillow_decodes_what_the_fast_decoder_refuses(change: Callable[[bytes], bytes]) -> None:
    """The photo is still decoded completely."""
    data = change(save(Image.fromarray(noise(16, 400)), "JPEG", subsampling=0))
    with pytest.raises((ValueError, KeyError)):
        _ = simplejpeg.decode_jpeg_header(data), simplejpeg.decode_jpeg(data)
    assert np.array_equal(decode(data, CAP), pillows(data))
    photo = decoding.decode(data, CAP, needed_side=32)
    assert photo.size == (16, 400)
    assert photo.pixels.shape == (4, 100, 3)


def test_two_readers_of_one_header_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """If libjpeg finds a different size from the one checked, Pillow decodes."""
    data = encode(gradient(), "JPEG")
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda _: (9999, 9999, "", ""))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", pytest.fail)
    assert np.array_equal(decode(data, CAP), pillows(data))


@pytest.mark.parametrize(
    ("size", "needed_side", "scaled"),
    [
        ((600, 800), 32, (75, 100)),
        ((801, 603), 32, (101, 76)),  # rounded up
        ((600, 800), 100, (225, 300)),
        ((600, 800), 140, (300, 400)),
        ((600, 800), 200, (600, 800)),  # past a half: whole
        ((600, 800), 900, (600, 800)),
        ((1, 4000), 64, (1, 500)),
    ],
)
def test_a_far_larger_jpeg_is_scaled(
    size: tuple[int, int], needed_side: int, scaled: tuple[int, int]
) -> None:
    """By eighths, never below the margin, and only if the caller states the side it needs."""
    data = encode(np.zeros((*size, 3), dtype=np.uint8), "JPEG")
    photo = decoding.decode(data, CAP, needed_side)
    assert photo.size == size
    assert photo.pixels.shape == (*scaled, 3)
    assert max(scaled) >= min(max(size), SCALING_MARGIN * needed_side)
    whole = decoding.decode(data, CAP)
    assert (whole.size, whole.pixels.shape, whole.box) == (size, (*size, 3), (0, 0, *size[::-1]))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP"])
def test_other_formats_are_never_scaled(image_format: str) -> None:
    """They have no cheaper decoding."""
    image = gradient(480, 640)
    assert decoding.decode(encode(image, image_format), CAP, 32).pixels.shape == image.shape


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_photo_is_upright_and_in_place(mode: str, orientation: int) -> None:
    """At a small size, the scaled photo equals the whole one, whichever side was rounded."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(noise(5, 7)).resize((803, 605), Image.Resampling.BICUBIC)
    data = save(smooth.convert(mode), "JPEG", quality=95, subsampling=0, exif=exif)
    whole = decoding.decode(data, CAP)
    scaled = decoding.decode(data, CAP, 64)
    assert np.array_equal(whole.pixels, pillows(data))
    assert scaled.size == whole.size == whole.pixels.shape[:2]
    assert max(scaled.pixels.shape) == 201  # a quarter of 803, rounded up

    def small(photo: DecodedPhoto) -> npt.NDArray[np.int64]:
        image = Image.fromarray(photo.pixels)
        shrunk = image.resize((64, 64), Image.Resampling.BILINEAR, photo.box)
        return np.asarray(shrunk).astype(np.int64)

    assert np.abs(small(whole) - small(scaled)).max() <= 3


def wide_gamut_profile() -> bytes:
    """A profile of sRGB with red and green swapped: a large and predictable change."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(bytes(profile).replace(b"s\0R\0G\0B", b"x\0R\0G\0B"))
    count = struct.unpack(">I", profile[128:132])[0]
    tags = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 136 + 12 * i for i in range(count)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    swapped = profile[green : green + 8], profile[red : red + 8]
    profile[red : red + 8], profile[green : green + 8] = swapped
    return bytes(profile)


@pytest.mark.parametrize("with_alpha", [False, True])
def test_the_icc_profile_is_applied(with_alpha: bool) -> None:
    """Under a profile that swaps red and green, stored red is shown green."""
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    image = Image.fromarray(red)
    if with_alpha:
        image.putalpha(255)
    decoded = decode(save(image, "PNG", icc_profile=wide_gamut_profile()), CAP)
    assert np.abs(decoded.astype(int) - (0, 255, 0)).max() <= 3


@pytest.mark.parametrize("needed_side", [None, 8])
def test_the_icc_profile_of_a_jpeg_is_applied(needed_side: int | None) -> None:
    """Scaled or not."""
    red = Image.new("RGB", (320, 240), "red")
    data = save(red, "JPEG", quality=95, icc_profile=wide_gamut_profile())
    photo = decoding.decode(data, CAP, needed_side)
    assert photo.pixels.shape == ((240, 320, 3) if needed_side is None else (30, 40, 3))
    assert np.abs(photo.pixels.astype(int) - (0, 255, 0)).max() <= 3


def test_an_srgb_profile_changes_nothing() -> None:
    """Nearly all photos with a profile have this one."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain, tagged = (encode(gradient(), "JPEG", icc_profile=icc) for icc in (None, profile))
    assert np.array_equal(decode(tagged, CAP), decode(plain, CAP))


@pytest.mark.parametrize(
    "profile",
    [
        b"nonsense",
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
        wide_gamut_profile()[:200],
    ],
)
def test_a_useless_profile_is_ignored(profile: bytes) -> None:
    """Broken, truncated, or for another colour space: the pixels stay as they are."""
    data = save(Image.fromarray(gradient()), "PNG", icc_profile=profile)
    assert np.array_equal(decode(data, CAP), gradient())


def test_cmyk_jpeg() -> None:
    """Print colours become roughly the original colours."""
    cmyk = Image.fromarray(gradient()).convert("CMYK")
    decoded = decode(save(cmyk, "JPEG", quality=95), CAP)
    assert np.abs(decoded.astype(int) - gradient()).mean() < 4


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(image_format: str) -> None:
    """0 is black, 65535 is white, the middle is grey: scaled, not clipped."""
    levels = np.array([[0, 255, 257, 32768, 65535]], dtype=np.uint16)
    decoded = decode(save(Image.fromarray(levels), image_format), CAP)
    assert decoded[0, :, 0].tolist() == [0, 1, 1, 128, 255]
    assert (decoded == decoded[..., :1]).all()


def test_16_bit_color_is_scaled() -> None:
    """A 16-bit RGB PNG, which Pillow cannot write, keeps its full range."""
    row = struct.pack(">6H", 0, 32896, 65535, 65535, 257, 0)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + row)
    data = PNG_SIGNATURE + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    )
    assert decode(data, CAP).tolist() == [[[0, 128, 255], [255, 1, 0]]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_grey_is_stretched(dtype: type) -> None:
    """Samples without an agreed range are stretched from their smallest to their largest."""
    levels: npt.NDArray[np.generic] = np.array([[-1000, 0, 1000]], dtype=dtype)
    decoded = decode(save(Image.fromarray(levels), "TIFF"), CAP)
    assert decoded[0, :, 0].tolist() == [0, 128, 255]


def test_float_without_a_finite_range_is_black() -> None:
    """Neither NaN nor infinity nor one single level is an error."""
    levels = np.array([[np.nan, np.inf, 7.0]], dtype=np.float32)
    assert not decode(save(Image.fromarray(levels), "TIFF"), CAP).any()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    """White is white in every mode."""
    white = 65535 if mode == "I;16" else "white"
    decoded = decode(save(Image.new(mode, (5, 3), white), "PNG"), CAP)
    assert decoded.shape == (3, 5, 3)
    assert (decoded == 255).all()


def with_palette_transparency(image: Image.Image) -> bytes:
    """Index 0 of a palette made transparent."""
    paletted = Image.new("P", image.size, 0)
    paletted.putpalette([9, 9, 9] * 256)
    return save(paletted, "PNG", transparency=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda image: save(image.convert("RGBA").point(lambda _: 0), "PNG"),
        lambda image: save(image.convert("LA").point(lambda _: 0), "PNG"),
        lambda image: save(Image.new("RGB", image.size, (9, 9, 9)), "PNG", transparency=(9, 9, 9)),
        lambda image: save(Image.new("RGBA", image.size), "WEBP", lossless=True),
        with_palette_transparency,
    ],
)
def test_transparency_is_over_white(make: Callable[[Image.Image], bytes]) -> None:
    """Every format's transparency is shown on white."""
    assert (decode(make(Image.fromarray(gradient())), CAP) == 255).all()


def test_half_transparency_is_blended() -> None:
    """Half of black over white is grey."""
    decoded = decode(save(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"), CAP)
    assert np.abs(decoded.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(image_format: str) -> None:
    """Later frames are ignored."""
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = save(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert (decode(data, CAP) == (255, 0, 0)).all()


@pytest.mark.parametrize("image_format", WRITTEN)
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_is_undecodable(image_format: str, part: float) -> None:
    """Half a photo is an error, scaled or not."""
    data = encode(noise(64, 64), image_format)
    for needed_side in (None, 8):
        with pytest.raises(UndecodableImage, match="broken"):
            decoding.decode(data[: int(len(data) * part)], CAP, needed_side)


def test_the_pixel_cap_is_checked_before_pixels_are_read() -> None:
    """A header with too many pixels is enough, even if no pixels follow."""
    data = encode(np.zeros((100, 101, 3), dtype=np.uint8))
    assert decode(data, 10_100).shape == (100, 101, 3)
    with pytest.raises(ImageTooLarge, match=r"101 x 100 = 10100 pixels, but at most 10099"):
        decode(data[:60], 10_099)


def test_a_decompression_bomb_is_too_large() -> None:
    """Images that Pillow refuses as too large are too large here."""
    header = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ImageTooLarge):
        decode(header, CAP)


@pytest.mark.parametrize(
    "error",
    [
        OSError("x"),
        SyntaxError("x"),
        ValueError("x"),
        struct.error("x"),
        EOFError("x"),
        KeyError("x"),
        IndexError("x"),
        TypeError("x"),
        AttributeError("x"),
        OverflowError("x"),
        ZeroDivisionError("x"),
        zlib.error("x"),
        RecursionError("x"),
        UserWarning("x"),
    ],
)
def test_whatever_pillow_raises_is_mapped(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the readers' exceptions reaches the caller."""

    def fail(*_: object, **__: object) -> None:
        raise error

    data = samples()["palette.gif"]
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UndecodableImage) as caught:
        decode(data, CAP)
    assert caught.value.__cause__ is error


def test_memory_that_runs_out_means_too_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image may be whole; an image worker gets as much memory as the header announces."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    data = samples()["palette.gif"]
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(TooExpensive, match="more memory than its header"):
        decode(data, CAP)


@pytest.mark.parametrize(
    "error", [Image.DecompressionBombError("x"), Image.DecompressionBombWarning("x")]
)
def test_pillows_bomb_guard_is_mapped(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error and its warning both mean: too many pixels."""

    def fail(*_: object, **__: object) -> None:
        raise error

    data = samples()["palette.gif"]
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageTooLarge):
        decode(data, CAP)


@settings(deadline=None, max_examples=300)
@given(hostile_files())
def test_a_damaged_file_never_raises_anything_else(data: bytes) -> None:
    """The result is an image or an `ImageError`."""
    with contextlib.suppress(ImageError):
        photo = decoding.decode(data, CAP, needed_side=2)
        assert photo.pixels.ndim == 3
        assert photo.pixels.shape[2] == 3


def too_many_samples() -> bytes:
    """A TIFF with 200 samples per pixel, which Pillow logs as an error."""
    data = samples()["several.tiff"]
    place = data.index(struct.pack("<HHI", 277, 3, 1)) + 8
    return data[:place] + struct.pack("<H", 200) + data[place + 2 :]


def tags_past_the_end() -> bytes:
    """A TIFF whose software tag claims to be longer than the file; Pillow warns about it."""
    data = save(Image.new("L", (4, 4)), "TIFF", software="abcdefgh")
    place = data.index(struct.pack("<HH", 305, 2)) + 4
    return data[:place] + struct.pack("<I", 99_999) + data[place + 4 :]


def wrong_fax() -> bytes:
    """A TIFF of a fax with wrong rows; libtiff writes a line about each."""
    data = samples()["fax.tiff"]
    return data[:8] + bytes(40) + data[48:]


@pytest.mark.parametrize("make", [too_many_samples, tags_past_the_end, wrong_fax])
def test_what_readers_say_of_a_file_goes_nowhere(
    make: Callable[[], bytes], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing goes to stderr or the log, and nothing is stored: a file controls the amount."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        decoding.keep_readers_quiet()
        with contextlib.suppress(ImageError):
            decode(make(), CAP)
    assert not warned
    assert not caplog.records
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("image_format", ["MPO", "TIFF"])
def test_the_first_of_several_pictures(image_format: str) -> None:
    """A thumbnail or another page is ignored."""
    pictures = [
        Image.new("RGB", size, color) for size, color in (((6, 4), "red"), ((3, 2), "blue"))
    ]
    data = save(pictures[0], image_format, save_all=True, append_images=pictures[1:])
    decoded = decode(data, CAP)
    assert decoded.shape == (4, 6, 3)
    assert np.abs(decoded.astype(int) - (255, 0, 0)).max() <= 3


def test_an_interlaced_png() -> None:
    """Its seven passes give the same pixels."""
    assert np.array_equal(decode(interlaced_png(Image.fromarray(gradient())), CAP), gradient())
