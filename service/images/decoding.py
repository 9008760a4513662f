"""Decode untrusted image files to ``(h, w, 3) uint8`` RGB. No other module opens them.

The first bytes determine the type, not a header or a file name. The pixel cap is checked on the
size in the image's own header, before pixels are allocated. All of Pillow's exceptions become one
of the three errors of `service.errors.ImageError`.

Pillow reads every header. The pixels of most JPEGs come from libjpeg-turbo directly (simplejpeg),
which is faster and can decode at an eighth to a half of the size. If it refuses a file, Pillow
decides.
"""

from __future__ import annotations

import ctypes
import io
import logging
import math
import warnings
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import simplejpeg  # type: ignore[import-untyped]
from PIL import ExifTags, Image, ImageCms, _imaging

from service.errors import ImageError, ImageTooLarge, UndecodableImage, UnsupportedImageType
from service.images.screening import MeteredFile, check_before_decoding, check_before_opening

IMAGE_MEDIA_TYPES: Final[dict[str, str]] = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "TIFF": "image/tiff",
}
"""Pillow's name of each allowed format, and its media type."""

_SIGNATURES: Final = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)

# Sizes of all versions of the information header; each starts with its own size.
_BMP_HEADER_BYTES: Final = frozenset({12, 40, 52, 56, 64, 108, 124})

# EXIF orientation -> the steps that turn the stored pixels upright: swap the axes, reverse the
# rows, reverse the columns. Source: EXIF 2.3, tag 0x0112.
_UPRIGHT: Final = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

# The colour space that a profile must describe before it may be applied to a mode.
_PROFILE_SPACES: Final = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}

SCALING_MARGIN: Final = 2.25
"""Minimum of decoded pixels per needed pixel along either side of a scaled photo.

For 12 VOC photos enlarged to 4,000 pixels, the mask then agrees with the whole photo's in 99.8 % of
the pixels (fp32) and 99.5 % (int8). An invisible change, a random grey level up or down, gives
99.5 % and 99.3 %, so a greater margin gains nothing. A margin of 1 gives 99.0 % (fp32).
"""


@dataclass(frozen=True, slots=True)
class DecodedPhoto:
    """A decoded photo, upright.

    ``pixels``: ``(h, w, 3) uint8`` RGB, contiguous; ``size``: the photo's own ``(H, W)``, equal to
    ``(h, w)`` unless the decoder scaled it down; ``box``: the part of ``pixels`` that the photo
    covers, ``(left, top, right, bottom)`` in pixels. Scaling rounds sizes up, so a scaled photo may
    cover its outermost row and column only partly.
    """

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]
    box: tuple[float, float, float, float]

    @classmethod
    def whole(cls, pixels: npt.NDArray[np.uint8]) -> Self:
        """A photo at its own size."""
        height, width, _ = pixels.shape
        return cls(pixels, (height, width), (0, 0, width, height))


def keep_readers_quiet() -> None:
    """Silence the messages of Pillow and its libraries in this process.

    A file can control their text and number. Python would also store each of Pillow's warnings, to
    show it only once.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # libtiff writes to stderr itself, for example a line for each wrong row of a fax.
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def sniff(data: bytes) -> str:
    """Return Pillow's name of the allowed format that starts with these bytes.

    Raises `UnsupportedImageType` for anything else.
    """
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    # Two letters are not enough: text may start with them.
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    raise UnsupportedImageType(f"not an image of an allowed type: {', '.join(IMAGE_MEDIA_TYPES)}")


def decode(data: bytes, max_pixels: int, needed_side: int | None = None) -> DecodedPhoto:
    """Decode a photo as a viewer shows it.

    Upright by its EXIF orientation, in sRGB by its ICC profile (a broken profile is ignored),
    transparency over white, the first frame of an animation, 16-bit scaled to 8. ``needed_side`` is
    the longest side in pixels that the caller resizes the photo to: a much larger JPEG is decoded
    at a fraction of its size. Without it, photos are decoded at their own size.

    Raises `UnsupportedImageType`, `ImageTooLarge` (more than ``max_pixels`` pixels by its header)
    or `UndecodableImage`.
    """
    image_format = sniff(data)
    try:
        check_before_opening(data, image_format)
        file = MeteredFile(data, image_format)
        with Image.open(file, formats=(image_format,)) as image:
            _check_size(image.size, max_pixels)
            check_before_decoding(data, image)
            file.header_ends()
            photo = _decode_jpeg(data, image, needed_side) if image_format == "JPEG" else None
            if photo is None:
                image.load()
                # Again: a container's header may state a smaller size than its frame has.
                _check_size(image.size, max_pixels)
                photo = DecodedPhoto.whole(np.array(_to_srgb(image)))
            # Only now: in a PNG it may follow the pixels; in a TIFF Pillow's load() applies it.
            return _turn_upright(photo, _orientation(image))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageTooLarge(f"the image has more than {max_pixels} pixels") from exc
    # Pillow's readers raise many kinds of errors: OSError, SyntaxError, ValueError, struct.error,
    # EOFError, KeyError, OverflowError, zlib.error, MemoryError and more.
    except Exception as exc:
        raise UndecodableImage(
            f"the {image_format} data is broken, truncated or of an unsupported variant"
        ) from exc


def _decode_jpeg(data: bytes, image: Image.Image, needed_side: int | None) -> DecodedPhoto | None:
    """Decode a JPEG's pixels as stored, possibly scaled; None if Pillow has to do it."""
    if image.mode not in ("RGB", "L"):
        return None
    profile = _foreign_profile(image.mode, image.info.get("icc_profile"))
    if profile is not None and image.mode == "L":  # the profile is for grey, not for RGB
        return None
    width, height = image.size
    # The longest side must not become smaller than this; 0: no scaling.
    least = math.ceil(needed_side * SCALING_MARGIN) if needed_side else 0
    try:
        # The cap was checked on Pillow's size; libjpeg must find the same one.
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None
        pixels = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=least if height >= width else 0,
            min_width=least if width > height else 0,
            # Between half and full size, libjpeg-turbo is slower than at full size.
            min_factor=2 if least else 1,
        )
    # ValueError for broken data, including mere warnings that Pillow ignores; KeyError and more for
    # unusual files. Pillow decides about all of them.
    except Exception:  # noqa: BLE001
        return None
    # libjpeg scales by eighths and rounds both sides up; the longer side gives the scale.
    scale = round(8 * max(pixels.shape[:2]) / max(width, height)) / 8
    if profile is not None:
        pixels = np.array(_apply_profile(Image.fromarray(pixels), profile))
    return DecodedPhoto(pixels, (height, width), (0, 0, width * scale, height * scale))


def _turn_upright(photo: DecodedPhoto, orientation: int) -> DecodedPhoto:
    if orientation not in _UPRIGHT:
        return photo
    swap, reverse_rows, reverse_columns = _UPRIGHT[orientation]
    size, box = photo.size, photo.box
    # One element of three bytes per pixel: NumPy moves these twice as fast as triples.
    pixels = photo.pixels.view("V3")[..., 0]
    if swap:
        pixels = pixels.T
        size, box = size[::-1], (box[1], box[0], box[3], box[2])
    height, width = pixels.shape
    if reverse_rows:
        pixels = pixels[::-1]
        box = (box[0], height - box[3], box[2], height - box[1])
    if reverse_columns:
        pixels = pixels[:, ::-1]
        box = (width - box[2], box[1], width - box[0], box[3])
    turned = np.ascontiguousarray(pixels)[..., None].view(np.uint8)
    return DecodedPhoto(turned, size, box)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} = {width * height} pixels, "
            f"but at most {max_pixels} are allowed"
        )
    if width < 1 or height < 1:
        raise UndecodableImage("the image has no pixels")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or the EXIF block is broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - a photo with a broken EXIF block is still a photo
        return 1
    return value if isinstance(value, int) else 1


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB in sRGB, transparency over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_8_bit(image).convert("RGB")
    icc_profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        if image.mode not in _PROFILE_SPACES:
            image = image.convert("RGB")
        return _apply_profile(image, _foreign_profile(image.mode, icc_profile))
    with_alpha = image.convert("RGBA")
    photo = _apply_profile(with_alpha.convert("RGB"), _foreign_profile("RGB", icc_profile))
    white = Image.new("RGB", photo.size, "white")
    white.paste(photo, mask=with_alpha.getchannel("A"))
    return white


def _foreign_profile(mode: str, icc_profile: object) -> ImageCms.ImageCmsProfile | None:
    """Return an RGB, L or CMYK image's profile if its pixels must be converted to sRGB."""
    if not isinstance(icc_profile, bytes) or not icc_profile:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        fits = profile.profile.xcolor_space.strip() == _PROFILE_SPACES[mode]
        # Most photos are in sRGB already, and the conversion is slow.
        foreign = fits and not ImageCms.getProfileDescription(profile).startswith("sRGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        # A photo with a broken profile is still a photo; viewers ignore the profile.
        return None
    return profile if foreign else None


def _apply_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    """Convert an RGB, L or CMYK image to RGB, by its profile if that is usable."""
    if profile is not None:
        try:
            converted = ImageCms.profileToProfile(
                image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            # As above: the conversion may find errors that the header did not show.
            return image.convert("RGB")
    return image.convert("RGB")


def _deep_to_8_bit(image: Image.Image) -> Image.Image:
    """Convert a grey image of 16 or 32 bits per sample to 8-bit grey.

    16-bit samples are scaled by 255 / 65535. 32-bit integers and floats have no agreed range, so
    they are stretched from their smallest to their largest finite value.
    """
    samples = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(((samples.astype(np.uint32) + 128) // 257).astype(np.uint8))
    finite = np.isfinite(samples)
    values = np.where(finite, samples, 0).astype(np.float64)
    low = values[finite].min(initial=np.inf)
    span = values[finite].max(initial=-np.inf) - low
    if not span > 0:
        return Image.fromarray(np.zeros(samples.shape, dtype=np.uint8))
    scaled = np.rint((values - low).clip(0, span) * (255 / span))
    return Image.fromarray(scaled.astype(np.uint8))
