"""Bytes from strangers to ``(h, w, 3) uint8`` RGB: the only place that opens an untrusted image.

The type comes from the first bytes, never from a header or a file name. The pixel cap is checked
on the size in the image's own header, before pixels are allocated. Whatever Pillow raises on the
way becomes one of the three errors of `service.errors.ImageError`.

Pillow reads every header. The pixels of most JPEGs come from libjpeg-turbo directly (simplejpeg),
which is faster and can decode at an eighth to a half of the size; whatever it refuses goes to
Pillow, whose verdict counts.
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

# Of each version of the information header, which says its own size first.
_BMP_HEADER_BYTES: Final = frozenset({12, 40, 52, 56, 64, 108, 124})

# EXIF orientation -> what turns the stored pixels upright: swap the axes first, then reverse the
# rows, then the columns. Source: EXIF 2.3, tag 0x0112.
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
"""Decoded pixels for each one that is needed, at least, along either side of a scaled photo.

Of 12 VOC photos enlarged to 4,000 pixels, 99.8 % of the fp32 mask's pixels are then those of the
whole photo, and 99.5 % of the int8 mask's. A grey level up or down at random, which nobody sees,
leaves 99.5 % and 99.3 %: a greater margin buys nothing. With a margin of 1 it is 99.0 % (fp32).
"""


@dataclass(frozen=True, slots=True)
class DecodedPhoto:
    """A decoded photo, upright.

    ``pixels``: ``(h, w, 3) uint8`` RGB, contiguous; ``size``: the photo's own ``(H, W)``, which is
    ``(h, w)`` unless it was scaled down while decoding; ``box``: what of ``pixels`` the photo
    covers, ``(left, top, right, bottom)`` in pixels. Scaling rounds sizes up, so a scaled photo may
    cover its outermost row and column only in part.
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
    """Keep what Pillow and its libraries say about files off stderr, in all of this process.

    They say it in words, and as often, as a file makes them. Pillow's warnings would be kept for
    ever too, to be shown once each.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # libtiff writes by itself, such as a line for each wrong row of a fax; Pillow lets it.
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def sniff(data: bytes) -> str:
    """Pillow's name of the allowed format that the first bytes announce.

    Raises `UnsupportedImageType` for anything else.
    """
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    # Two letters are not enough: text may begin with them.
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    raise UnsupportedImageType(f"not an image of an allowed type: {', '.join(IMAGE_MEDIA_TYPES)}")


def decode(data: bytes, max_pixels: int, needed_side: int | None = None) -> DecodedPhoto:
    """Decode a photo as a viewer shows it.

    Upright by its EXIF orientation, in sRGB by its ICC profile (a broken profile is ignored),
    transparency over white, the first frame of an animation, 16-bit scaled to 8. With
    ``needed_side``, the longest side in pixels that the caller will bring the photo to, a JPEG far
    larger than that is decoded at a fraction of its size, else at its own.

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
                # Again: a container's header may promise less than its frame holds.
                _check_size(image.size, max_pixels)
                photo = DecodedPhoto.whole(np.array(_to_srgb(image)))
            # Only now: PNG's may follow the pixels, and TIFF's is applied by Pillow's load().
            return _turn_upright(photo, _orientation(image))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ImageTooLarge(f"the image has more than {max_pixels} pixels") from exc
    # Pillow's readers raise whatever their parsing runs into: OSError, SyntaxError, ValueError,
    # struct.error, EOFError, KeyError, OverflowError, zlib.error, MemoryError and more.
    except Exception as exc:
        raise UndecodableImage(
            f"the {image_format} data is broken, truncated or of an unsupported variant"
        ) from exc


def _decode_jpeg(data: bytes, image: Image.Image, needed_side: int | None) -> DecodedPhoto | None:
    """A JPEG's pixels as stored, possibly scaled, without Pillow; None where Pillow must do it."""
    if image.mode not in ("RGB", "L"):
        return None
    profile = _foreign_profile(image.mode, image.info.get("icc_profile"))
    if profile is not None and image.mode == "L":  # the profile speaks of grey, not of RGB
        return None
    width, height = image.size
    # Smaller than this along the longest side it may not become; 0: no scaling.
    least = math.ceil(needed_side * SCALING_MARGIN) if needed_side else 0
    try:
        # The cap was checked on the size that Pillow found; libjpeg must have found the same.
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
    # ValueError for broken data, down to warnings that Pillow lets pass, KeyError and more for what
    # is unusual: Pillow's verdict counts.
    except Exception:  # noqa: BLE001
        return None
    # libjpeg scales by eighths and rounds both sides up, so the longer one tells by how many.
    scale = round(8 * max(pixels.shape[:2]) / max(width, height)) / 8
    if profile is not None:
        pixels = np.array(_apply_profile(Image.fromarray(pixels), profile))
    return DecodedPhoto(pixels, (height, width), (0, 0, width * scale, height * scale))


def _turn_upright(photo: DecodedPhoto, orientation: int) -> DecodedPhoto:
    if orientation not in _UPRIGHT:
        return photo
    swap, reverse_rows, reverse_columns = _UPRIGHT[orientation]
    size, box = photo.size, photo.box
    # One element of three bytes a pixel: NumPy moves these twice as fast as triples.
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
    """EXIF orientation 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - a photo with a broken EXIF block is still a photo
        return 1
    return value if isinstance(value, int) else 1


def _to_srgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB in sRGB, transparency over white."""
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
    """A profile that pixels of an RGB, L or CMYK image must be converted from; None without one."""
    if not isinstance(icc_profile, bytes) or not icc_profile:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        fits = profile.profile.xcolor_space.strip() == _PROFILE_SPACES[mode]
        # Most photos say that they are sRGB already, and the conversion is slow.
        foreign = fits and not ImageCms.getProfileDescription(profile).startswith("sRGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        # A photo with a broken profile is still a photo; viewers show it plainly.
        return None
    return profile if foreign else None


def _apply_profile(image: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    """An RGB, L or CMYK image to RGB by its profile; plainly, without a usable one."""
    if profile is not None:
        try:
            converted = ImageCms.profileToProfile(
                image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            # As above: the conversion may find what the header did not show.
            return image.convert("RGB")
    return image.convert("RGB")


def _deep_to_8_bit(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits a sample as 8-bit grey.

    16-bit samples are scaled by 255 / 65535. 32-bit integers and floats have no agreed range:
    they are stretched from their least to their greatest finite value.
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
