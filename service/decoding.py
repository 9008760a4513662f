"""Bytes from strangers to ``(H, W, 3) uint8`` RGB: the only place that opens an untrusted image.

The type comes from the first bytes, never from a header or a file name. The pixel cap is checked
on the size in the image's own header, before pixels are allocated. Whatever Pillow raises on the
way becomes one of the three errors of `service.errors.ImageError`.
"""

from __future__ import annotations

import io
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms

from service.errors import ImageError, ImageTooLarge, UndecodableImage, UnsupportedImageType

MEDIA_TYPES: Final[dict[str, str]] = {
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
    (b"BM", "BMP"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)

# EXIF orientation -> what turns the stored pixels upright. Source: EXIF 2.3, tag 0x0112.
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The colour space that a profile must describe before it may be applied to a mode.
_PROFILE_SPACES: Final = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


def sniff(data: bytes) -> str:
    """Pillow's name of the allowed format that the first bytes announce.

    Raises `UnsupportedImageType` for anything else.
    """
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise UnsupportedImageType(f"not an image of an allowed type: {', '.join(MEDIA_TYPES)}")


def decode(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode a photo as a viewer shows it.

    Upright by its EXIF orientation, in sRGB by its ICC profile (a broken profile is ignored),
    transparency over white, the first frame of an animation, 16-bit scaled to 8. Returns
    ``(H, W, 3) uint8`` RGB, contiguous and writeable.

    Raises `UnsupportedImageType`, `ImageTooLarge` (more than ``max_pixels`` pixels by its header)
    or `UndecodableImage`.
    """
    image_format = sniff(data)
    try:
        with Image.open(io.BytesIO(data), formats=(image_format,)) as image:
            _check_size(image.size, max_pixels)
            image.load()
            # Again: a container's header may promise less than its frame holds.
            _check_size(image.size, max_pixels)
            upright = _UPRIGHT.get(_orientation(image))
            photo = _to_srgb(image)
            if upright is not None:
                photo = photo.transpose(upright)
            return np.array(photo)
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
        # After load(): PNG's may follow the pixels, and TIFF's is applied by Pillow's load().
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - a photo with a broken EXIF block is still a photo
        return 1
    return value if isinstance(value, int) else 1


def _to_srgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as RGB in sRGB, transparency over white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_8_bit(image).convert("RGB")
    profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        if image.mode not in _PROFILE_SPACES:
            image = image.convert("RGB")
        return _apply_profile(image, profile)
    with_alpha = image.convert("RGBA")
    photo = _apply_profile(with_alpha.convert("RGB"), profile)
    white = Image.new("RGB", photo.size, "white")
    white.paste(photo, mask=with_alpha.getchannel("A"))
    return white


def _apply_profile(image: Image.Image, icc_profile: object) -> Image.Image:
    """An RGB, L or CMYK image to RGB by its ICC profile; plainly, without a usable one."""
    if isinstance(icc_profile, bytes) and icc_profile:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
            fits = profile.profile.xcolor_space.strip() == _PROFILE_SPACES[image.mode]
            # Most photos say that they are sRGB already, and the conversion is slow.
            if fits and not ImageCms.getProfileDescription(profile).startswith("sRGB"):
                converted = ImageCms.profileToProfile(
                    image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
                )
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            # A photo with a broken profile is still a photo; viewers show it plainly.
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
